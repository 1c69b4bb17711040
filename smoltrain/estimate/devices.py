"""The device of a rank: a GPU by its name, or this machine's CPU, whose speed is measured."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.distributed.memory_limits import find_rank_limit, find_shared_limit
from smoltrain.errors import Problem, UserError, suggest_choice
from smoltrain.estimate.constants import GPU_OF_CUDA_NAME, GPUS, DeviceSpec
from smoltrain.kernels.precision import DTYPES

CPU = torch.device("cpu")
PEAK_SIZE = 1024  # of the square matrices by which a start measures the peak: as fast as 2048 and 4096 on our CPUs
PEAK_BUDGET_S = 0.1  # that a start may spend on it, two calls at least


@dataclass(frozen=True)
class GpuPeak:
    """The matmul peak of a GPU; of one that is in no table, why there is none."""

    flops: float | None  # operations per second
    source: str  # in a few words, for the console


def find_gpu_peak(device: torch.device, precision: str) -> GpuPeak:
    """By the data sheet of this GPU, in this precision."""
    if device.type != "cuda":
        return GpuPeak(None, f"no data sheet of {device.type} is known here")
    name = torch.cuda.get_device_name(device)
    if name not in GPU_OF_CUDA_NAME:
        return GpuPeak(None, f"no data sheet of {name} is known here")
    return GpuPeak(GPUS[GPU_OF_CUDA_NAME[name]].peak_flops(precision), f"the data sheet of {name}")


def measure_cpu_peak(precision: str) -> float:
    """The matmul peak in this precision of all cores that this process may use: operations per second.

    A thread computes on each core, all at the same time, and counts its own CPU time: what other processes take of the
    cores meanwhile is in no number. Takes a tenth of a second, and changes neither random numbers nor torch's threads.
    """
    cores = num_cores()
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        a = torch.randn(PEAK_SIZE, PEAK_SIZE).to(DTYPES[precision])
        b = torch.randn(PEAK_SIZE, PEAK_SIZE).to(DTYPES[precision])
    try:
        with ThreadPoolExecutor(cores) as pool:
            measuring = [pool.submit(_fastest_on_one_core, lambda: a @ b) for _ in range(cores)]
            return sum(2 * PEAK_SIZE**3 / future.result() for future in measuring)
    finally:
        torch.set_num_threads(threads)


def _fastest_on_one_core(call: Callable[[], object]) -> float:
    """CPU seconds of the fastest call of those that PEAK_BUDGET_S has room for, after a first one that warms up."""
    torch.set_num_threads(1)
    deadline_s = time.perf_counter() + PEAK_BUDGET_S
    call()
    fastest_s = math.inf
    while math.isinf(fastest_s) or time.perf_counter() < deadline_s:
        began_s = time.thread_time()
        call()
        fastest_s = min(fastest_s, time.thread_time() - began_s)
    return fastest_s


def find_device(name: str, world_size: int) -> DeviceSpec:
    """The device of each of so many ranks; `cpu` is this machine, which its ranks share. Errors: UserError."""
    if name == "cpu":
        return measure_this_cpu(world_size)
    if name not in GPUS:
        want = suggest_choice(name, (*GPUS, "cpu"))
        raise UserError(Problem(what="no such device", saw=repr(name), want=want, change="--device"))
    return GPUS[name]


def measure_this_cpu(world_size: int) -> DeviceSpec:
    """This machine's share for each of its ranks. Takes a second."""
    threads = torch.get_num_threads()
    half_flops = measure_matmul_flops(torch.bfloat16)
    fp32_flops = measure_matmul_flops(torch.float32)
    bandwidth = _measure_copy_bandwidth()
    torch.set_num_threads(threads)
    return DeviceSpec(
        name="cpu", kind="cpu", memory=find_shared_limit().num_bytes / world_size,
        half_flops=half_flops / world_size, fp32_flops=fp32_flops / world_size,
        bandwidth=bandwidth / world_size, link=bandwidth / world_size,
    )  # fmt: skip


def find_device_of_run(device: torch.device, cpu_peak_flops: float | None, num_ranks: int) -> tuple[DeviceSpec, str]:
    """The device of each rank of a run that is under way here, and whose speed that is, in a few words.

    `num_ranks` are those of this machine, `cpu_peak_flops` of all its cores. Takes no second and 64 MiB on a CPU, whose
    memory may be full; so there only the times of one recipe's settings can be compared.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = GPU_OF_CUDA_NAME.get(name, "a100-80")
        whose = name if name in GPU_OF_CUDA_NAME else f"{known}, as no data sheet of {name} is known here"
        memory = torch.cuda.get_device_properties(device).total_memory
        return replace(GPUS[known], memory=memory), whose
    flops = (cpu_peak_flops or measure_cpu_peak("fp32")) / num_ranks
    bandwidth = _measure_copy_bandwidth(mib=32, rounds=2) / num_ranks
    memory = find_rank_limit(num_ranks).num_bytes
    return DeviceSpec("cpu", "cpu", memory, flops, flops, bandwidth, bandwidth), "this machine"


def fastest_of_eight(call: Callable[[], object]) -> float:
    """Seconds of the fastest of eight calls."""
    return min(_time_call(call) for _ in range(8))


def measure_matmul_flops(
    dtype: torch.dtype, device: torch.device = CPU, size: int = 2048,
    measure_s: Callable[[Callable[[], object]], float] = fastest_of_eight,
) -> float:  # fmt: skip
    """The matmul peak of one device: operations per second, 2 x size^3 for each product of two square matrices.

    `measure_s` gives the seconds of a call, which on a GPU has to wait for its end. On a CPU all cores compute, and
    torch's number of threads stays so.
    """
    if device.type == "cpu":
        torch.set_num_threads(num_cores())
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / measure_s(lambda: a @ b)


def _measure_copy_bandwidth(mib: int = 256, rounds: int = 4) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(mib << 18)  # fp32: 4 bytes each
    target = torch.ones(mib << 18)
    return 2 * source.nbytes / min(_time_call(lambda: target.copy_(source)) for _ in range(rounds))


def _time_call(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
