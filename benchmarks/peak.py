"""The peaks of this machine, of which MFU and the roofline are shares: `python -m benchmarks.peak [PRECISION] [SIZE]`.

It prints them as JSON. A process of its own, so that neither threads nor GPU memory stay behind.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import time_interleaved
from smoltrain import files
from smoltrain.distributed.world import choose_device
from smoltrain.estimate import devices
from smoltrain.kernels.precision import DTYPES

ROOT = Path(__file__).parent.parent
CPU_SIZE = 4096  # of the square matrices
GPU_SIZE = 8192
GPU_WARM_UP_S = 0.5  # an idle H200 computes at 345 MHz, and takes a while to reach 1,980
GPU_BATCH = 20  # calls between two waits for the device, which cost as much as a small kernel
GPU_BATCHES = 5
GPU_COPY_BYTES = 2**30
CPU_COPY_BYTES = 2**26


class Peaks(NamedTuple):
    """Of one GPU, or of all cores of a CPU."""

    matmul_flops: float  # measured, operations per second
    copied_bytes_per_s: float  # measured, read and written
    data_sheet_flops: float | None  # None where no data sheet of this device is known here
    data_sheet: str  # which one, or why none


def measure_peaks(precision: str, size: int | None = None) -> Peaks:
    """Both measured peaks in this precision, and what the vendor says. `size`: as measure_matmul_flops."""
    sheet = devices.find_gpu_peak(choose_device(), precision)
    return Peaks(measure_matmul_flops(precision, size), measure_copied_bytes_per_s(), sheet.flops, sheet.source)


def measure_matmul_flops(precision: str, size: int | None = None, rounds: int = 8) -> float:
    """As the estimate's, on one GPU or all cores, but of the median of the clean calls, or of batches on a GPU.

    `size` of the square matrices: by default as large as the device needs to reach its peak.
    """
    device = choose_device()
    size = size or (GPU_SIZE if device.type == "cuda" else CPU_SIZE)

    def measure_s(matmul: Callable[[], object]) -> float:
        if device.type == "cuda":
            return time_in_batches(matmul, torch.cuda.synchronize)
        return time_interleaved({"matmul": matmul}, rounds=rounds)["matmul"].median_s

    return devices.measure_matmul_flops(DTYPES[precision], device, size, measure_s)


def measure_copied_bytes_per_s() -> float:
    """Bytes read and written per second by a large copy within the device's memory."""
    device = choose_device()
    size = GPU_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device.type == "cuda":
        took_s = time_in_batches(lambda: target.copy_(source), torch.cuda.synchronize)
    else:
        took_s = devices.fastest_of_eight(lambda: target.copy_(source))
    return 2 * size / took_s


def time_in_batches(
    call: Callable[[], object], wait: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call on a GPU: the fastest of GPU_BATCHES batches of GPU_BATCH, behind a warm-up.

    `wait` returns when the device has done all that it was given.
    """
    warm_at = clock() + GPU_WARM_UP_S
    while clock() < warm_at:
        call()
        wait()
    batches_s: list[float] = []
    for _ in range(GPU_BATCHES):
        began_s = clock()
        for _ in range(GPU_BATCH):
            call()
        wait()
        batches_s.append(clock() - began_s)
    return min(batches_s) / GPU_BATCH


def measure_peaks_once(precision: str, kept: Path | None, size: int | None = None) -> Peaks:
    """The peaks that a file holds; or measured now, and kept there for the next who asks."""
    if kept is not None and kept.exists():
        return Peaks(**json.loads(kept.read_text(encoding="utf-8")))
    peaks = measure_peaks_apart(precision, size)
    if kept is not None:
        files.write_json_file(kept, peaks._asdict())
    return peaks


def measure_peaks_apart(precision: str, size: int | None = None) -> Peaks:
    """The peaks, measured by a process of its own."""
    words = [sys.executable, "-m", "benchmarks.peak", precision, *([str(size)] if size else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    return Peaks(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    asked = sys.argv[1:] or ["bf16"]
    print(json.dumps(measure_peaks(asked[0], int(asked[1]) if len(asked) > 1 else None)._asdict()))
