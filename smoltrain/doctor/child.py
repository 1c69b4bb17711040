"""A process of its own for what may crash, hang or hold Python's lock: libraries, drivers, collectives."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from smoltrain.distributed.rendezvous import LAUNCHER_VARIABLES
from smoltrain.openmp import choose_waiting

PYTHON = [sys.executable, "-P"]  # -P: no module of the current folder, as the ranks of a run
REAP_S = 2.0  # for a killed process to end: one that waits for a dead disk may not


class ChildResult(NamedTuple):
    """How a process ended: `code` is None if it had to be killed as its time was over, -N if signal N ended it."""

    code: int | None
    out: str
    err: str

    def describe_failure(self, limit_s: float) -> str:
        """Why it is no success, in a few words."""
        if self.code is None:
            return f"no answer within {limit_s:g} s"
        lines = [line for line in self.err.strip().splitlines() if line.strip()]
        said = f": {lines[-1].strip()}" if lines else ""
        if self.code < 0:
            name = next((known.name for known in signal.Signals if known == -self.code), f"signal {-self.code}")
            return f"the process was ended by {name}{said}"
        return f"the process ended with code {self.code}{said}"


def child_environment(**variables: str) -> dict[str, str]:
    """This process's, but for what a launcher says; with the waiting of threads that a run chooses."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    return choose_waiting() | own | variables


def start_child(
    words: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> subprocess.Popen[str]:  # fmt: skip
    """Start Python with these words, in a session of its own, its output in pipes."""
    return subprocess.Popen(
        [*PYTHON, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace", env=dict(environment), pass_fds=pass_fds, start_new_session=True,
    )  # fmt: skip


def await_child(process: subprocess.Popen[str], limit_s: float) -> ChildResult:
    """How it ends; killed with all of its children if that takes longer."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        kill_child(process)
        return ChildResult(None, "", "")
    return ChildResult(process.returncode, out, err)


def kill_child(process: subprocess.Popen[str]) -> None:
    """End it and the children that it has started; nothing if it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(REAP_S)


def run_command(words: Sequence[str], limit_s: float) -> str | None:
    """What a program of the system prints; None where there is no such program, or it fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
