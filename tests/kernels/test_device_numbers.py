"""Numbers between host and device: what arrives, and on a GPU that nobody waits for it."""

import warnings

import pytest
import torch

from smoltrain.kernels.device_numbers import DeviceMoment, ReturningNumbers, send_numbers


def there_and_back(device: torch.device) -> tuple[ReturningNumbers, DeviceMoment, DeviceMoment]:
    began = DeviceMoment(device)
    sent = send_numbers((0.1, 2.0), device, torch.float64)
    returning = ReturningNumbers(sent * 2)
    return returning, began, DeviceMoment(device)


def test_numbers_come_back_as_they_were_sent() -> None:
    returning, began, ended = there_and_back(torch.device("cpu"))
    assert returning.read() == [0.2, 4.0]
    assert ended.seconds_since(began) > 0
    assert send_numbers((0.1,), torch.device("cpu")).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_for_them_only_when_it_reads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        returning, began, ended = there_and_back(torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert returning.read() == [0.2, 4.0]
    assert ended.seconds_since(began) > 0
