"""The CPU cores of a rank: how many there are, which are its own, and how many threads compute on them.

The two hyperthreads of a core share its multipliers, so one thread computes on each core. A rank that is bound to cores
of its own keeps what is in their caches and, on a machine with several sockets, the memory beside them.

How its threads wait for each other: smoltrain/openmp.py.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smoltrain.distributed.cgroups import find_cpu_quota

CPUS = Path("/sys/devices/system/cpu")  # man 5 sysfs
TASKS = Path("/proc/self/task")
Core = tuple[int, ...]  # the CPUs of one core, as the kernel numbers them: its hyperthreads


class CpuShare(NamedTuple):
    """What one rank computes with; no `cpus` where it is not to be bound."""

    threads: int
    cpus: frozenset[int]
    how: str  # in a few words, for the console


def usable_cores() -> list[Core]:
    """The cores that this process may use; those of one socket stand together."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return [(cpu,) for cpu in range(os.cpu_count() or 1)]
    cores: dict[tuple[int, int], Core] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        place = _locate_core(cpu)
        cores[place] = (*cores.get(place, ()), cpu)
    return [cores[place] for place in sorted(cores)]


def _locate_core(cpu: int) -> tuple[int, int]:
    """(socket, first CPU of the same core); a core of its own where the kernel does not say."""
    folder = CPUS / f"cpu{cpu}" / "topology"
    try:
        siblings = (folder / "thread_siblings_list").read_text()  # "0,64" or "0-1"
        return int((folder / "physical_package_id").read_text()), int(re.split("[,-]", siblings)[0])
    except (OSError, ValueError):
        return 0, cpu


def num_cores() -> int:
    """The cores that this process may use, or as many as the quota of its container pays for."""
    num = len(usable_cores())
    quota = find_cpu_quota()
    return num if quota is None else max(1, min(num, int(quota)))


def cores_per_process(processes: int) -> int:
    """How many cores each of so many processes has, where they share them out evenly: one at least."""
    return max(1, num_cores() // processes)


def assign_cores(usable_by: list[list[Core]], place: int, asked: int | None = None) -> CpuShare:
    """The part of one rank of a machine, the `place`-th of those whose usable cores are in `usable_by`.

    Ranks that may use the same cores share them out. Where they may not, their launcher has shared them out already.
    `asked` is a number of threads, which then run wherever they like.
    """
    own = usable_by[place]
    num = len(usable_by)
    if asked:
        return CpuShare(asked, frozenset(), "not bound, as SMOLTRAIN_THREADS is set")
    if any(other != own for other in usable_by):
        return CpuShare(
            min(len(own), num_cores()), frozenset(), f"bound to {_describe_core_count(own)} by the launcher"
        )
    threads = cores_per_process(num)
    size = len(own) // num
    mine = own[place * size : (place + 1) * size]
    if num == 1 or not mine:
        return CpuShare(
            threads, frozenset(), "not bound" if num == 1 else f"not bound: {num} ranks on {_describe_core_count(own)}"
        )
    if not hasattr(os, "sched_setaffinity"):
        return CpuShare(threads, frozenset(), "not bound: this system cannot")
    return CpuShare(
        threads, frozenset(cpu for core in mine for cpu in core), f"bound to {_describe_core_count(mine)} of its own"
    )


def _describe_core_count(cores: list[Core]) -> str:
    return f"{len(cores)} core{'s' * (len(cores) > 1)}"


@contextlib.contextmanager
def bind_to_cpus(cpus: frozenset[int]) -> Iterator[None]:
    """All threads of this process, and those that they start inside, run on these CPUs only; on any, if none is said.

    Afterwards they may use again what this thread could before.
    """
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    _set_affinity(cpus)
    try:
        yield
    finally:
        _set_affinity(before)


def _set_affinity(cpus: frozenset[int] | set[int]) -> None:
    for task in TASKS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), cpus)
