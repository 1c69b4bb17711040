"""Timings on cores that others use too: which calls were disturbed, and the median of those that were not.

A call that shares its cores can take ten times as long, and looks no different. The kernel knows: it counts for every
thread the time in which it could have run and had no core (proc(5), /proc/PID/task/TID/schedstat, second field). Of a
call that is the wait of the thread that waited most: a sum would blame a program for having many threads that sleep.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

MAX_WAIT_SHARE = 0.05  # of a call's time at most may a thread have waited for a core
MIN_CLEAN_CALLS = 3  # clean calls that make a median
ALL_COUNT = ", so all count"
PROC = Path("/proc")


@dataclass(frozen=True)
class CallTimes:
    """What one function's calls took."""

    median_s: float  # of the clean calls; of all where those are fewer than MIN_CLEAN_CALLS
    clean: str  # in words: how many calls were, and whether the median is theirs
    rounds: int

    @property
    def num_clean(self) -> str:
        """For a narrow column: "3/5"."""
        return self.clean.partition(",")[0].replace(" of ", "/")

    @property
    def counts_all(self) -> bool:
        """Whether too few calls were clean, so that the median is of all."""
        return self.clean.endswith(ALL_COUNT)


def time_interleaved(
    work: Mapping[str, Callable[[], object]], *, rounds: int = 10, warm_up: int = 2
) -> dict[str, CallTimes]:
    """Time functions by name: in each round every one is called once, in turn, so that all meet the same disturbances.

    The first `warm_up` rounds are not counted. What a call leaves running on a GPU belongs to it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    waits: dict[str, list[float | None]] = {name: [] for name in work}
    for round_ in range(warm_up + rounds):
        for name, call in work.items():
            took, waited = _time_call(call)
            if round_ >= warm_up:
                seconds[name].append(took)
                waits[name].append(waited)
    return {name: summarise_times(seconds[name], waits[name]) for name in work}


def summarise_times(seconds: Sequence[float], waits: Sequence[float | None]) -> CallTimes:
    """The median of the clean calls among these (both in seconds); a wait that is None is not known."""
    clean = select_clean_calls(seconds, waits)
    if None in waits:
        return CallTimes(median(seconds), "not known", len(seconds))
    if len(clean) < MIN_CLEAN_CALLS:
        return CallTimes(median(seconds), f"{len(clean)} of {len(seconds)}{ALL_COUNT}", len(seconds))
    return CallTimes(median(clean), f"{len(clean)} of {len(seconds)}", len(seconds))


def select_clean_calls(seconds: Sequence[float], waits: Sequence[float | None]) -> list[float]:
    """The calls in which no thread waited for MAX_WAIT_SHARE of the time; unknown waits count as none."""
    return [took for took, waited in zip(seconds, waits, strict=True) if (waited or 0.0) < MAX_WAIT_SHARE * took]


def read_thread_waits(process: int | str = "self") -> dict[str, float]:
    """Seconds that each living thread of a process has waited for a core so far, by its id; {} where nobody counts."""
    try:
        files = list(Path(PROC, str(process), "task").glob("*/schedstat"))
    except OSError:
        return {}
    waits_ns = {file.parent.name: _read_wait_ns(file) for file in files}
    return {thread: waited / 1e9 for thread, waited in waits_ns.items() if waited is not None}


def longest_wait_s(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """The longest wait of one thread between two readings of the same processes; None where nobody counts."""
    return max((waited - before.get(thread, 0.0) for thread, waited in after.items()), default=None)


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the difference over the norm of the truth, in the truth's dtype."""
    return float((ours.to(truth.dtype) - truth).norm() / truth.norm())


def _time_call(call: Callable[[], object]) -> tuple[float, float | None]:
    """(seconds, seconds of waiting) of one call."""
    before = read_thread_waits()
    began = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    return took, longest_wait_s(before, read_thread_waits())


def _read_wait_ns(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):  # the thread has ended, or this kernel was built without the counts
        return None
