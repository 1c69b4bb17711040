"""What ran and for how long: kernels of a GPU, operations of a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass

GAP_S = 10e-6  # shorter pauses are those between any two kernels


@dataclass(frozen=True)
class KernelRun:
    """One launch of a kernel, or of a copy, or one operation; in seconds of the profiler's clock."""

    name: str
    began_s: float
    ended_s: float

    @property
    def took_s(self) -> float:
        """Seconds."""
        return self.ended_s - self.began_s


@dataclass(frozen=True)
class DeviceTimeline:
    """What a device did between the first kernel and the last one."""

    span_s: float
    busy_s: float
    gaps_s: list[float]  # those longer than GAP_S, the longest first


def sum_by_kernel(runs: Sequence[KernelRun]) -> list[tuple[str, int, float]]:
    """(kernel, launches, seconds), the longest first."""
    launches: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for run in runs:
        launches[run.name] = launches.get(run.name, 0) + 1
        seconds[run.name] = seconds.get(run.name, 0.0) + run.took_s
    return sorted(((name, launches[name], seconds[name]) for name in launches), key=lambda time: -time[2])


def find_timeline(runs: Sequence[KernelRun]) -> DeviceTimeline:
    """Kernels of several streams may overlap: what any of them does is no gap."""
    ordered = sorted(runs, key=lambda run: run.began_s)
    busy_s = 0.0
    gaps_s: list[float] = []
    done_s = ordered[0].began_s
    for run in ordered:
        gap_s = run.began_s - done_s
        if gap_s > GAP_S:
            gaps_s.append(gap_s)
        busy_s += max(0.0, run.ended_s - max(run.began_s, done_s))
        done_s = max(done_s, run.ended_s)
    return DeviceTimeline(done_s - ordered[0].began_s, busy_s, sorted(gaps_s, reverse=True))
