"""The matmul peak of this machine, by which MFU is told: `python -m benchmarks.peak [bf16|fp16|fp32]` prints it.

A process of its own, so that neither threads nor GPU memory stay behind.
"""

import sys

import torch

from benchmarks.timing import time_interleaved
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.distributed.world import choose_device
from smoltrain.kernels.precision import DTYPES

SIZE = 4096


def measure_matmul_flops(precision: str, size: int = SIZE, rounds: int = 8) -> float:
    """Floating-point operations per second of a square matmul, 2 x size^3 each, on one GPU or all cores."""
    device, dtype = choose_device(), DTYPES[precision]
    if device.type == "cpu":
        torch.set_num_threads(num_cores())
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / time_interleaved({"matmul": lambda: a @ b}, rounds=rounds)["matmul"].median_s


if __name__ == "__main__":
    print(measure_matmul_flops(sys.argv[1] if len(sys.argv) > 1 else "bf16"))
