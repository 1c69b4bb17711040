"""A rank that ran out of memory: seen by its error, measured while its tensors are there, told in a page."""

import errno
import os
import re
import sys
import traceback

import psutil
import torch

from smoltrain.config.schema import Config
from smoltrain.distributed.memory_limits import MemoryLimit, find_rank_limit, read_peak_resident_bytes
from smoltrain.distributed.world import World
from smoltrain.engine.held_tensors import list_held_tensors, sum_by_part
from smoltrain.errors import RankTrainingStopped, exception_message, iterate_causes
from smoltrain.estimate.constants import CUDA_BASE_BYTES
from smoltrain.estimate.training_setup import Resolved
from smoltrain.training.assess_failure import assess_failure
from smoltrain.training.memory_page import MemoryFailure, describe_failure, format_gib, format_tables, write_page
from smoltrain.training.session import Session
from smoltrain.training.start import Start

# torch's CPU allocator; CUDA's, MPS's and cuBLAS's; C++; the kernel (strerror of ENOMEM).
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory: you tried|out of memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc"
    r"|Cannot allocate memory",
    re.IGNORECASE,
)
ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)  # torch's and numpy's
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that there was no memory."""
    return any(_says_no_memory(cause) for cause in iterate_causes(error))


def _says_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def find_asked_bytes(message: str) -> float:
    """What was asked for, as the message of an allocator says; 0 if it does not."""
    found = ASKED.search(message)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


def explain_out_of_memory(
    error: BaseException, start: Start, world: World, session: Session | None
) -> RankTrainingStopped:
    """Write the page of this rank, show its beginning, and return what to raise instead of the error.

    `session` is None where it could not be opened. The frames of the error are cleared, so that what they hold is free.
    """
    failure = _measure_rank(error, start, world, session)
    traceback.clear_frames(error.__traceback__)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    logs = start.config.run_folder / "logs"
    try:
        failure = assess_failure(failure, start, world.device, world.local_size, session and _find_settings(session))
        page = write_page(failure, logs)
    except (MemoryError, RuntimeError, OSError) as another:  # there is no memory, and perhaps no disk
        plain = f"rank {world.rank} on {failure.host} ran out of memory {failure.where}: {failure.what}"
        return RankTrainingStopped(f"{plain}; its page could not be made ({exception_message(another)})")
    pages = {path: path.stat().st_mtime_ns for path in logs.glob("out-of-memory-rank*.txt")}
    of_this_start = [path for path, written_ns in pages.items() if written_ns >= start.began_at * 1e9]
    if page == min(
        of_this_start, key=lambda path: (pages[path], path.name), default=page
    ):  # of those who fail together
        print(format_tables(failure), file=sys.stderr, flush=True)
    return RankTrainingStopped(str(describe_failure(failure, page)))


def _measure_rank(error: BaseException, start: Start, world: World, session: Session | None) -> MemoryFailure:
    """What there is now, while the error still holds what was computed."""
    message = exception_message(error)
    where = f"at its start, before step {start.point.step + 1}"
    parts: dict[str, list[torch.Tensor]] = {}
    if session is not None:
        step, place = session.watchdog.place
        where = f"in step {step}, {place}"
        parts = session.engine.list_tensors()
    tensors = list_held_tensors(parts, world.device)
    by_part = sum_by_part(tensors)
    del parts
    notes: list[str] = []
    if world.device.type == "cuda":
        held = float(torch.cuda.memory_allocated(world.device)) + CUDA_BASE_BYTES
        free, total = torch.cuda.mem_get_info(world.device)
        reserved = torch.cuda.memory_reserved(world.device)
        limit = MemoryLimit(total, "all memory of this GPU")
        notes.append(
            f"of the GPU {format_gib(free)} are free, {format_gib(reserved)} are torch's in this process, of which "
            f"{format_gib(reserved - held + CUDA_BASE_BYTES)} lie between its tensors; "
            f"{format_gib(total - free - reserved)} are CUDA's own or another process's"
        )
    else:
        peak = read_peak_resident_bytes()
        held = float(psutil.Process().memory_info().rss)
        limit = find_rank_limit(world.local_size)
        notes.append(f"resident memory at its highest, earlier or now: {format_gib(peak)}")
    notes.append(f"process {os.getpid()}")
    return MemoryFailure(
        rank=world.rank, num_ranks=world.size, host=world.hosts[world.rank],
        where=where, what=f"{type(error).__name__}: {message}", limit=limit, asked=find_asked_bytes(message), held=held,
        held_parts={part: size for part, size in by_part.items() if part != "other"}, tensors=tensors, notes=notes,
    )  # fmt: skip


def _find_settings(session: Session) -> tuple[Config, Resolved]:
    """The config that trains, and what its start has chosen."""
    resolved: Resolved = {"precision": session.precision}
    if session.computing is not None:
        resolved["computing"] = session.computing
    return session.config, resolved
