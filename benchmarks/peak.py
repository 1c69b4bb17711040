"""The matmul peak of this machine, by which MFU is told: `python -m benchmarks.peak [bf16|fp16|fp32]` prints it.

A process of its own, so that neither threads nor GPU memory stay behind.
"""

import sys

from benchmarks.timing import time_interleaved
from smoltrain.distributed.world import choose_device
from smoltrain.estimate import devices
from smoltrain.kernels.precision import DTYPES

SIZE = 4096


def measure_matmul_flops(precision: str, size: int = SIZE, rounds: int = 8) -> float:
    """As the estimate's, on one GPU or all cores, but of the median of the clean calls, waiting for a GPU's end."""
    return devices.measure_matmul_flops(
        DTYPES[precision], choose_device(), size,
        lambda matmul: time_interleaved({"matmul": matmul}, rounds=rounds)["matmul"].median_s,
    )  # fmt: skip


if __name__ == "__main__":
    print(measure_matmul_flops(sys.argv[1] if len(sys.argv) > 1 else "bf16"))
