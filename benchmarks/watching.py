"""A trainer at work, watched from outside: each step's seconds, its ranks' waits for a core, memory, losses.

Whatever trains writes a line of JSON behind each step and each evaluation, as smoltrain's own metrics.jsonl has it, and
is not told that it is watched. So all trainers are timed by one clock, in the same way.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.timing import PROC, longest_wait_s, read_thread_waits

POLL_S = 0.002  # between two reads of the file of lines
STALL_S = 900.0  # without a line, after which a trainer is ended
KEPT_LOG = 40, 240  # lines that are kept, characters of each
GRACE_S = 60.0  # for a trainer to end by itself, or when told to
LOSS, PEAK = "train/loss_nats_per_token", "memory/peak_gib"
VALIDATION_LOSS = "validation/loss_nats_per_token"
ERROR = re.compile(r"^error: |(^|\]: ?)[\w.]*Error: ")  # smoltrain's, and Python's, which torchrun indents


class TrainerFailed(Exception):
    """A trainer ended, or was ended, before its last step; its last words in one line."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run, behind a step."""

    step: int
    loss: float  # nats per token of the validation rows
    seconds: float  # that it took
    at_s: float  # when it was done, since the command


@dataclass
class TrainerRecord:
    """What one run of a trainer showed; lists have one entry per step, but for that of the evaluations."""

    start_s: float = 0.0  # from the command to the end of the first step
    step_s: list[float] = field(default_factory=list)  # without an evaluation before it; the first is start_s
    waits_s: list[float | None] = field(default_factory=list)  # of the thread that waited most; None: not known
    losses: list[float] = field(default_factory=list)
    peak_gib: float = 0.0  # CPU: resident memory of all ranks at their peaks; CUDA: allocated, the largest rank
    parameters: int | None = None  # as the trainer counts them, if it does
    said: list[str] = field(default_factory=list)  # the first lines, in which trainers tell what they have chosen
    evaluations: list[Evaluation] = field(default_factory=list)


def watch_trainer(
    command: Sequence[str], lines: Path, steps: int, env: Mapping[str, str], log: Path, *, cuda: bool,
    evaluations: int = 0, grace_s: float = GRACE_S,
) -> TrainerRecord:  # fmt: skip
    """Run a command that appends to `lines` until it has done its steps and evaluations; its words go to `log`.

    It has `grace_s` then to end by itself. A signal to end this process ends the trainer first. Errors: TrainerFailed.
    """
    began = time.perf_counter()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with log.open("w", encoding="utf-8") as words:
        process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        seen = _record_steps(process, lines, steps, evaluations, began, cuda=cuda)
        with contextlib.suppress(subprocess.TimeoutExpired):  # how it ends is not what is measured
            process.wait(grace_s)
    except TimeoutError:
        raise TrainerFailed(f"no step for {STALL_S:.0f} s; {find_error_line(log)}") from None
    finally:
        end_process_tree(process)
        signal.signal(signal.SIGTERM, before)
    if len(seen.losses) < steps or len(seen.evaluations) < evaluations:
        done = f"{len(seen.losses)} of {steps} steps"
        if evaluations:
            done += f", {len(seen.evaluations)} of {evaluations} evaluations"
        raise TrainerFailed(f"{done}, then exit code {process.returncode}; {find_error_line(log)}")
    seen.said = [line[: KEPT_LOG[1]] for line in _read_log_lines(log)[: KEPT_LOG[0]]]
    return seen


def _record_steps(
    process: subprocess.Popen, lines: Path, steps: int, evaluations: int, began: float, *, cuda: bool
) -> TrainerRecord:
    """Poll the file until the last step and evaluation are in it, or the process ended. Errors: TimeoutError."""
    seen = TrainerRecord()
    offset = 0
    last = began
    ranks: list[psutil.Process] = []
    waits: dict[str, float] = {}
    while len(seen.losses) < steps or len(seen.evaluations) < evaluations:
        ended = process.poll() is not None  # before the file is read: what it wrote last is read too
        offset, new = _read_new_lines(lines, offset)
        for line in new:
            if LOSS not in line and VALIDATION_LOSS not in line:
                continue
            now = time.perf_counter()
            if not ranks:
                ranks = find_rank_processes(process.pid)
            before = waits
            waits = {thread: waited for rank in ranks for thread, waited in read_thread_waits(rank.pid).items()}
            took = now - last
            last = now
            if LOSS not in line:
                seen.evaluations.append(Evaluation(line["step"], line[VALIDATION_LOSS], took, now - began))
                continue
            seen.step_s.append(took)
            seen.waits_s.append(longest_wait_s(before, waits))
            seen.losses.append(line[LOSS])
            seen.start_s = seen.start_s or now - began
            if cuda:
                seen.peak_gib = line.get(PEAK, 0.0)
            else:  # 0 where the ranks have ended by now
                seen.peak_gib = sum(map(peak_rss_gib, ranks)) or seen.peak_gib
            seen.parameters = line.get("parameters", seen.parameters)
        if ended:
            break
        if time.perf_counter() > last + STALL_S:
            raise TimeoutError
        time.sleep(POLL_S)
    return seen


def _read_new_lines(file: Path, offset: int) -> tuple[int, list[dict[str, Any]]]:
    """The whole lines behind byte `offset` of the file, and the byte at which they end."""
    try:
        if os.stat(file).st_size == offset:  # noqa: PTH116 - 500 times a second
            return offset, []
        with file.open("rb") as opened:
            opened.seek(offset)
            new = opened.read()
    except FileNotFoundError:
        return offset, []
    whole = new[: new.rfind(b"\n") + 1]
    return offset + len(whole), [json.loads(line) for line in whole.splitlines()]


def find_rank_processes(root: int) -> list[psutil.Process]:
    """The processes that train: those a launcher has given a rank, but not what they start; else `root` itself."""
    try:
        top = psutil.Process(root)
        family = [top, *top.children(recursive=True)]
    except psutil.Error:
        return []
    ranked = {process.pid for process in family if _has_rank(process)}
    ranks = [process for process in family if process.pid in ranked and _parent_pid(process) not in ranked]
    return ranks or [top]


def peak_rss_gib(process: psutil.Process) -> float:
    """The most memory that a process has had resident so far; what it has now where the kernel does not tell."""
    try:
        status = Path(PROC, str(process.pid), "status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 2**20
    except (OSError, StopIteration):
        with contextlib.suppress(psutil.Error):
            return process.memory_info().rss / 2**30
    return 0.0


def end_process_tree(process: subprocess.Popen) -> None:
    """Nothing of what it started is alive afterwards."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    if process.poll() is None:
        process.kill()
        process.wait()
    for child in family:
        with contextlib.suppress(psutil.Error):  # which also sees that a number is another process's by now
            child.kill()
    with contextlib.suppress(ProcessLookupError):  # one that it started after its children were listed
        os.killpg(process.pid, signal.SIGKILL)
    psutil.wait_procs(family, GRACE_S)  # to be killed takes a moment


def find_error_line(log: Path) -> str:
    """Why a trainer ended, cut to what a table can hold: its first line about an error, else the last one it said."""
    lines = _read_log_lines(log)
    if not lines:
        return "it said nothing"
    errors = [line for line in lines if ERROR.search(line)]  # those behind the first tell that a rank has died
    return (errors or lines[-1:])[0][:300]


def _read_log_lines(log: Path) -> list[str]:
    """The lines of a log that say something."""
    return [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _has_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ()
    except psutil.Error:
        return False


def _parent_pid(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return -1
