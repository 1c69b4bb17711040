"""How much memory this process may use, and how often the kernel has killed for want of it.

Who limits it: the machine; a cgroup, as containers and SLURM's jobs have; the process's own limits (man 2 getrlimit).
"""

import contextlib
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from smoltrain.distributed.cgroups import find_cgroup_files

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss (man 2 getrusage)
VMSTAT = Path("/proc/vmstat")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryLimit:
    """So many bytes, and who says so."""

    num_bytes: float
    source: str


def find_shared_limit() -> MemoryLimit:
    """The memory that this process shares with others: the smallest of its cgroups' limits and the machine's."""
    limits = [MemoryLimit(psutil.virtual_memory().total, "all memory of this machine")]
    for files in find_cgroup_files():
        with contextlib.suppress(OSError, ValueError):  # "max"; the root has no such file
            limits.append(MemoryLimit(int(files.limit.read_text()), f"the cgroup's limit, {files.limit}"))
    return min(limits, key=lambda limit: limit.num_bytes)


def find_rank_limit(num_ranks: int) -> MemoryLimit:
    """What one of so many ranks of this machine may have in memory: its share, or less by a limit of its own.

    RLIMIT_AS and RLIMIT_DATA count addresses, of which a process has more than lie in memory, and RLIMIT_DATA does not
    count files that do: the difference is taken off.
    """
    shared = find_shared_limit()
    among = f" among {num_ranks} ranks" if num_ranks > 1 else ""
    limits = [MemoryLimit(shared.num_bytes / num_ranks, shared.source + among)]
    now = psutil.Process().memory_info()
    for name, addresses in (("AS", now.vms), ("DATA", getattr(now, "data", now.rss))):
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        if soft != resource.RLIM_INFINITY:
            limits.append(MemoryLimit(soft - (addresses - now.rss), f"its RLIMIT_{name}, a ulimit"))
    return min(limits, key=lambda limit: limit.num_bytes)


def read_peak_resident_bytes() -> int:
    """The most memory of this process that was resident at once, since its program was started.

    getrusage(2) tells more: what its parent had when it forked this process is in ru_maxrss still.
    """
    with contextlib.suppress(OSError):  # not Linux
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


@dataclass(frozen=True)
class KillCount:
    """How many processes the kernel had killed for want of memory, and the file that counts them."""

    file: Path
    count: int

    @property
    def is_of_machine(self) -> bool:
        """Whether the processes of everybody on this machine are counted, containers of others too."""
        return self.file == VMSTAT


def read_kill_count() -> KillCount | None:
    """Of this process's cgroup; of the whole machine where no cgroup counts; None where nothing does."""
    for file in [*(files.kills for files in find_cgroup_files()[:1]), VMSTAT]:
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
            if found:
                return KillCount(file, int(found[1]))
    return None
