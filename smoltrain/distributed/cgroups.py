"""What the kernel's control groups leave to this process: containers and batch systems set them (man 7 cgroups)."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MEMORY_FILES = {  # by version: the limit, what is taken, how often the kernel has killed
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"),
    2: ("memory.max", "memory.current", "memory.events"),
}


@dataclass(frozen=True)
class CgroupPlaces:
    """Where groups are mounted, and the file that says which are this process's."""

    mounts: Path = MOUNTS
    own: Path = OWN


PLACES = CgroupPlaces()  # those of this machine, where no others are asked for


@dataclass(frozen=True)
class CgroupFiles:
    """The memory controller of one group, of either version: cgroup-v1/memory.rst and cgroup-v2.rst of the kernel."""

    group: Path
    limit: Path
    usage: Path
    kills: Path  # with a line `oom_kill N`


@dataclass(frozen=True)
class CgroupMemory:
    """The tightest limit above this process, and what of it is taken; bytes."""

    limit: int
    used: int  # what the kernel could not give back at once: without the cache of files
    group: Path

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return max(0, self.limit - self.used)


def find_cgroup_files(places: CgroupPlaces | None = None) -> list[CgroupFiles]:
    """Those of this process's own group and of all above it, as far as they can be seen; its own first."""
    found: list[CgroupFiles] = []
    for group, version in iterate_cgroups("memory", places):
        limit, usage, kills = MEMORY_FILES[version]
        found.append(CgroupFiles(group, group / limit, group / usage, group / kills))
    return found if any(files.limit.exists() for files in found) else []


def find_cgroup_memory(places: CgroupPlaces | None = None) -> CgroupMemory | None:
    """The one that leaves least, of versions 1 and 2; None where there is none."""
    found: list[CgroupMemory] = []
    for files in find_cgroup_files(places):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none; the root of version 2 has no files
            limit = int(files.limit.read_text())
            used = int(files.usage.read_text()) - _read_file_cache(files.group)
            if limit < 2**60:  # which version 1 says where there is none
                found.append(CgroupMemory(limit, max(0, used), files.group))
    return min(found, key=lambda memory: memory.free, default=None)


def find_cpu_quota(places: CgroupPlaces | None = None) -> float | None:
    """CPUs whose time this process may use, as in 1.5; None where there is no quota."""
    least = math.inf
    for folder, version in iterate_cgroups("cpu", places):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                allowed, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                allowed = int((folder / "cpu.cfs_quota_us").read_text())  # -1 where there is none
                period = int((folder / "cpu.cfs_period_us").read_text())
            if allowed > 0:
                least = min(least, allowed / period)
    return None if math.isinf(least) else least


def _read_file_cache(folder: Path) -> int:
    """Bytes of files that the group has read, and that the kernel drops first."""
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, number = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(number)
    return 0


def iterate_cgroups(controller: str, places: CgroupPlaces | None = None) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's group with that controller, and of those above it, which limit it too.

    In a container the own group may be mounted as the root, so that its path leads nowhere: the root is looked at too.
    """
    places = places or PLACES
    try:
        lines = places.own.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            unified = places.mounts / "unified"
            root = unified if unified.is_dir() else places.mounts
            version = 2
        elif controller in controllers.split(","):
            root = places.mounts / controller
            version = 1
        else:
            continue
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if group == root.parent:
                break
            if group.is_dir():
                yield group, version
