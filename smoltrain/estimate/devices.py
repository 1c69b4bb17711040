"""Devices by name: how much memory they have, and how fast they compute, read and send.

The GPUs' numbers are their vendors' data sheets' (NVIDIA H200, H100 SXM, A100 SXM, L4; GeForce RTX 4090), dense and
without sparsity; a GB there is 10^9 bytes. This machine's CPU is measured.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import Problem, UserError, suggest_choice

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class DeviceSpec:
    """What one rank has: bytes, operations per second by precision, bytes per second of its memory and of its link."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory: float
    half_flops: float  # bf16 and fp16, sums in fp32
    fp32_flops: float  # of a matmul in the default of torch, which is no TF32
    bandwidth: float
    link: float  # to the other ranks of the node, each direction

    def peak_flops(self, precision: str) -> float:
        """Peak of a matmul in this precision."""
        return self.fp32_flops if precision == "fp32" else self.half_flops


GPUS = {
    device.name: device
    for device in (
        DeviceSpec("h200", "cuda", 141 * GB, 989 * TERA, 67 * TERA, 4800 * GB, 450 * GB),
        DeviceSpec("h100", "cuda", 80 * GB, 989 * TERA, 67 * TERA, 3350 * GB, 450 * GB),
        DeviceSpec("a100-80", "cuda", 80 * GB, 312 * TERA, 19.5 * TERA, 2039 * GB, 300 * GB),
        DeviceSpec("a100-40", "cuda", 40 * GB, 312 * TERA, 19.5 * TERA, 1555 * GB, 300 * GB),
        DeviceSpec("l4", "cuda", 24 * GB, 121 * TERA, 30.3 * TERA, 300 * GB, 32 * GB),
        DeviceSpec("4090", "cuda", 24 * GB, 165 * TERA, 82.6 * TERA, 1008 * GB, 32 * GB),
    )
}


def find_device(name: str, world: int) -> DeviceSpec:
    """The device of one of `world` ranks; `cpu` is this machine, which its ranks share. Errors: UserError."""
    if name == "cpu":
        return measure_this_cpu(world)
    if name not in GPUS:
        raise UserError(Problem("no such device", repr(name), suggest_choice(name, (*GPUS, "cpu")), "--device"))
    return GPUS[name]


def measure_this_cpu(world: int) -> DeviceSpec:
    """This machine's share for each of its ranks. Takes a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_cores())
    half, fp32 = (_measure_matmul_flops(dtype) for dtype in (torch.bfloat16, torch.float32))
    bandwidth = _measure_copy_bandwidth()
    torch.set_num_threads(threads)
    memory = psutil.virtual_memory().total
    return DeviceSpec("cpu", "cpu", memory / world, half / world, fp32 / world, bandwidth / world, bandwidth / world)


def _measure_matmul_flops(dtype: torch.dtype, size: int = 2048, rounds: int = 8) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in "ab")
    return 2 * size**3 / min(_time_call(lambda: a @ b) for _ in range(rounds))


def _measure_copy_bandwidth(mib: int = 256, rounds: int = 4) -> float:
    """Bytes read and written per second by a large copy."""
    source, target = (torch.ones(mib << 18) for _ in "ab")
    return 2 * source.nbytes / min(_time_call(lambda: target.copy_(source)) for _ in range(rounds))


def _time_call(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
