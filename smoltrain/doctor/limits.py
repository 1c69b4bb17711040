"""What the kernel allows this process: open files, locked memory, memory, shared memory."""

import os
import resource
import secrets
from collections.abc import Callable
from pathlib import Path

import psutil

from smoltrain.distributed.cgroups import CgroupPlaces, find_cgroup_memory
from smoltrain.doctor.check import Finding
from smoltrain.doctor.needs import RunNeeds

GIB = 2**30
FEW_FILES, TOO_FEW_FILES = 1024, 256  # that one process may have open; the first is what most systems give
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")
NCCL_SHARED_BYTES = GIB  # NCCL's "Troubleshooting": --shm-size=1g for containers
SEMAPHORE_BYTES = 2**20  # more than what the processes that tokenise need


def check_open_files() -> Finding:
    """man 2 getrlimit, RLIMIT_NOFILE: shards, token files, sockets to the other ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "without a limit" if hard == resource.RLIM_INFINITY else f"{hard:,} at most"
    advice = f"`ulimit -n {max(soft, 65536) if hard == resource.RLIM_INFINITY else hard}` before the run"
    if hard < FEW_FILES and hard != resource.RLIM_INFINITY:
        advice = "a larger `nofile` in /etc/security/limits.conf, or --ulimit nofile=65536 of a container"
    if soft < TOO_FEW_FILES:
        return Finding("fault", f"a process may open {soft:,} files: a rank would run out of them", advice)
    if soft < FEW_FILES:
        return Finding("warning", f"a process may open {soft:,} files: few for many shards or ranks", advice)
    return Finding("ok", f"a process may open {soft:,} files ({most})")


def check_locked_memory(infiniband: Path = INFINIBAND) -> Finding:
    """man 2 getrlimit, RLIMIT_MEMLOCK: InfiniBand locks the memory that it sends from."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("ok", "any amount may be locked")
    adapters = sorted(path.name for path in infiniband.glob("*")) if infiniband.is_dir() else []
    saw = f"{soft / 2**20:,.0f} MiB may be locked"
    if adapters:
        advice = "`ulimit -l unlimited`: memlock in /etc/security/limits.conf, --ulimit memlock=-1 of a container"
        return Finding("warning", f"{saw}, and NCCL over {', '.join(adapters)} wants to lock more", advice)
    return Finding("ok", f"{saw}; only InfiniBand would want more, and there is none")


def check_memory(
    estimate: Callable[[], RunNeeds] | None, cgroups: CgroupPlaces | None = None, available: int | None = None
) -> Finding:  # fmt: skip
    """What the machine and its control groups leave, against what the recipe is estimated to take."""
    machine = psutil.virtual_memory()
    free = machine.available if available is None else available
    limit = find_cgroup_memory(cgroups)
    saw = f"{free / GIB:.1f} of {machine.total / GIB:.1f} GiB are free"
    most = machine.total
    if limit is not None and limit.limit < machine.total:
        free = min(free, limit.free)
        most = limit.limit
        saw = f"{limit.free / GIB:.1f} of {limit.limit / GIB:.1f} GiB that {limit.group} allows are free"
    if estimate is None:
        return Finding("ok", saw)
    needs = estimate()
    needed = needs.memory_bytes * needs.ranks if needs.device == "cpu" else 0.0
    fits = "a smaller batch.micro_batch, engine.gradient_checkpointing=full, or fewer --ranks: `smoltrain estimate`"
    if needs.device == "cuda":
        saw = f"{needs.memory_bytes / GIB:.1f} GiB of the GPU's {needs.device_bytes / GIB:.1f}; {saw}"
        if needs.memory_bytes > needs.device_bytes:
            return Finding("fault", f"a rank takes {saw}", fits)
        return Finding("ok", f"a rank takes {saw}")
    what = f"{needs.ranks} ranks take about {needed / GIB:.1f} GiB"
    if needed > most:
        return Finding("fault", f"{what}, and {saw}: the kernel would end them", fits)
    if needed > free:
        return Finding("warning", f"{what}, and {saw}", f"end what else takes memory, or {fits}")
    return Finding("ok", f"{what}; {saw}")


def check_shared_memory(num_gpus: int, folder: Path = SHARED_MEMORY) -> Finding:
    """NCCL's ranks of one machine meet there, and so do the processes that tokenise. A file is really written."""
    if not folder.is_dir():
        return Finding("fault", f"there is no {folder}", f"`mount -t tmpfs tmpfs {folder}`")
    wanted = NCCL_SHARED_BYTES if num_gpus > 1 else SEMAPHORE_BYTES
    advice = f"--shm-size=1g of a container, or `mount -o remount,size=1g {folder}`"
    path = folder / f"smoltrain-{secrets.token_hex(8)}"
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        path.unlink()  # what is open stays
        try:
            os.posix_fallocate(handle, 0, SEMAPHORE_BYTES)
        finally:
            os.close(handle)
    except OSError as error:
        mend = f"what fills it (`ls -la {folder}`), or {advice}"
        return Finding("fault", f"{folder} cannot be written: {error.strerror}", mend)
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < wanted:
        saw = f"{free / 2**20:,.0f} MiB are free in {folder}; NCCL wants {wanted / 2**20:,.0f}"
        return Finding("warning", saw, advice)
    return Finding("ok", f"{free / 2**20:,.0f} MiB are free in {folder}")
