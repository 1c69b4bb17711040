"""What ran and for how long: kernels of a GPU, operations of a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass


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


def sum_by_kernel(runs: Sequence[KernelRun]) -> list[tuple[str, int, float]]:
    """(kernel, launches, seconds), the longest first."""
    launches: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for run in runs:
        launches[run.name] = launches.get(run.name, 0) + 1
        seconds[run.name] = seconds.get(run.name, 0.0) + run.took_s
    return sorted(((name, launches[name], seconds[name]) for name in launches), key=lambda time: -time[2])
