"""Sums in fp32 of what is in bf16, as fast as memory allows."""

from torch import Tensor

CHUNK_ELEMENTS = 2**18  # elements that stay in a CPU's caches between the two loops


def accumulate_fp32(total: Tensor, part: Tensor) -> None:
    """total += part, whose dtype may be narrower. Both of one shape; `total` is contiguous.

    On a CPU torch 2.13 converts and adds in one loop that is not vectorised: ten times slower than these two.
    """
    if total.dtype == part.dtype or total.device.type != "cpu":
        total += part
        return
    for wide, narrow in zip(total.view(-1).split(CHUNK_ELEMENTS), part.reshape(-1).split(CHUNK_ELEMENTS), strict=True):
        wide.add_(narrow.to(total.dtype))
