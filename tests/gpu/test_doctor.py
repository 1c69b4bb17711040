"""The doctor on a machine with GPUs: it finds them, and NCCL adds up where there are two."""

import pytest
import torch

from smoltrain.doctor.all_reduce import check_all_reduce
from smoltrain.doctor.probe import Probe
from smoltrain.doctor.software import check_bf16, check_cuda, check_gpu_clocks, check_nccl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_the_gpus_are_found_and_multiply_right() -> None:
    probe = Probe()
    assert check_cuda(probe, None).saw.startswith(f"{torch.cuda.device_count()} GPUs: ")
    assert check_bf16(probe, None).status == "ok"
    assert check_nccl(probe).status == "ok"
    assert "nvidia-smi does not say" not in check_gpu_clocks(probe).saw


def test_two_gpus_add_up() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    assert check_all_reduce("cuda").status == "ok"
