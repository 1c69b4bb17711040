"""A rank that the kernel killed for want of memory, told from any other kill -9 by the kernel's own count of kills."""

import signal
import socket
import sys
from typing import NamedTuple

import psutil
import torch

from smoltrain import files
from smoltrain.distributed.memory_limits import KillCount, MemoryLimit, find_rank_limit, read_kill_count
from smoltrain.errors import Problem
from smoltrain.training.assess_failure import assess_failure
from smoltrain.training.memory_page import MemoryFailure, describe_failure, format_tables, write_page
from smoltrain.training.start import Start

LOOK_S = 5.0  # between two looks at the count; a rank is gone long before the second one after its death
HOST_MEMORY = "checkpoint.background=false, which keeps no copy of the state in host memory, or more of that memory"


class KillWatch:
    """The count of kills as it was some seconds ago: what it has grown by when a rank is gone is the evidence."""

    def __init__(self) -> None:
        self._before = self._newest = read_kill_count()
        self._looked_at_s = 0.0

    def note_count(self, now_s: float) -> None:
        """Take note of the count, now and then. The last two are kept, for a rank may die just before a look."""
        if now_s >= self._looked_at_s + LOOK_S:
            self._looked_at_s = now_s
            self._before = self._newest
            self._newest = read_kill_count()

    def find_evidence(self, exit_code: int) -> str:
        """By which file the kernel has killed a process for want of memory, if this one was killed; else empty."""
        now = read_kill_count()
        if exit_code != -signal.SIGKILL or now is None or self._before is None:
            return ""
        return describe_kills(self._before, now)


def describe_kills(before: KillCount, now: KillCount) -> str:
    """As in `memory.events: oom_kill 0 -> 1`; empty where the count has not grown, or is another file's."""
    if now.file != before.file or now.count <= before.count:
        return ""
    whose = ", of all processes of this machine" if now.is_of_machine else ""
    return f"{now.file}: oom_kill {before.count} -> {now.count}{whose}"


class KilledRank(NamedTuple):
    """What the kernel's accounts alone tell of a rank that is gone."""

    rank: int
    evidence: str  # KillWatch's
    peak_bytes: int  # the largest resident set of its process


def explain_killed_rank(killed: KilledRank, num_ranks: int, start: Start, device: torch.device) -> Problem | str:
    """Write the page of a rank that is gone, show its beginning; the line that says what happened."""
    metrics = start.config.run_folder / "metrics.jsonl"
    step = max((line["step"] for line in files.read_jsonl(metrics)), default=0) if metrics.exists() else 0
    limit = find_rank_limit(num_ranks)
    own = psutil.Process().memory_info()
    beside = own.rss - getattr(own, "shared", 0)  # this process's own pages, in the same cgroup or machine
    limit = MemoryLimit(limit.num_bytes - beside / num_ranks, f"{limit.source}, less what this command itself has")
    failure = MemoryFailure(
        rank=killed.rank, num_ranks=num_ranks, host=socket.gethostname(),
        where=f"after step {step}" if step > start.point.step else f"before step {start.point.step + 1} was done",
        what=f"the kernel's out-of-memory killer ended it by SIGKILL ({killed.evidence})", limit=limit,
        held=float(killed.peak_bytes),
        notes=("what it really held is the largest resident set of its process",),
        advice=HOST_MEMORY,
    )  # fmt: skip
    if device.type != "cuda":  # of whose host memory there is no estimate
        failure = assess_failure(failure, start, device, num_ranks)
    try:
        page = write_page(failure, start.config.run_folder / "logs")
    except OSError as error:
        return f"rank {killed.rank} {failure.where}: {failure.what}; its page could not be written ({error.strerror})"
    print(format_tables(failure), file=sys.stderr, flush=True)
    return describe_failure(failure, page)
