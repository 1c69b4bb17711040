"""The device of a rank."""

import pytest
import torch

from smoltrain.estimate import devices
from smoltrain.estimate.constants import GPUS
from smoltrain.estimate.devices import find_device, measure_matmul_flops


def test_the_matmul_peak_counts_a_multiplication_and_an_addition_each():
    assert measure_matmul_flops(torch.float32, size=10, measure_s=lambda call: 0.5) == 2 * 10**3 / 0.5


def test_the_ranks_of_a_cpu_share_it(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(devices, "measure_matmul_flops", lambda dtype: 8e9 if dtype == torch.float32 else 16e9)
    monkeypatch.setattr(devices, "_measure_copy_bandwidth", lambda: 4e9)
    one, four = (find_device("cpu", world) for world in (1, 4))
    assert (one.fp32_flops, one.half_flops, one.bandwidth) == (8e9, 16e9, 4e9)
    assert (one.peak_flops("fp32"), one.peak_flops("bf16")) == (8e9, 16e9)
    assert (four.fp32_flops, four.half_flops, four.bandwidth, four.link) == (2e9, 4e9, 1e9, 1e9)
    assert four.memory == one.memory / 4
    assert find_device("l4", 4) == find_device("l4", 1) == GPUS["l4"]
    assert torch.get_num_threads() == threads
