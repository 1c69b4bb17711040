"""The matmul peak of this machine, by which MFU is told: `python -m smoltrain.bench.peak [bf16|fp16|fp32]` prints it.

A process of its own, so that neither threads nor GPU memory stay behind.
"""

import sys

import torch

from smoltrain.bench.timing import interleaved
from smoltrain.cores import num_cores
from smoltrain.dist import choose_device
from smoltrain.ds_config import DTYPES

SIZE = 4096


def matmul_flops(precision: str, size: int = SIZE, rounds: int = 8) -> float:
    """Floating-point operations per second of a square matmul, 2 x size^3 each, on one GPU or all cores."""
    device, dtype = choose_device(), DTYPES[precision]
    if device.type == "cpu":
        torch.set_num_threads(num_cores())
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / interleaved({"matmul": lambda: a @ b}, rounds=rounds)["matmul"].median_s


if __name__ == "__main__":
    print(matmul_flops(sys.argv[1] if len(sys.argv) > 1 else "bf16"))
