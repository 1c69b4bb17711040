"""Sums of narrow numbers in wide ones."""

import pytest
import torch

from smoltrain.kernels import fp32_sums
from smoltrain.kernels.fp32_sums import accumulate_fp32


@pytest.mark.parametrize("shape", [(7,), (3, 5), (64, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_is_what_one_addition_gives(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp32_sums, "CHUNK_ELEMENTS", 16)
    total, part = torch.randn(shape), torch.randn(shape).to(dtype)
    want = total + part.float()
    accumulate_fp32(total, part)
    assert torch.equal(total, want)


def test_the_part_may_lie_otherwise_in_memory() -> None:
    total, part = torch.zeros(4, 6), torch.arange(24.0).view(6, 4).bfloat16().T
    accumulate_fp32(total, part)
    assert torch.equal(total, part.float())
