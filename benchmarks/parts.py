"""Commands with a time limit, one after the other: each prints as it goes, and none ends the others.

A part says by its exit code what it has found out: 0 that all is well, CODE_CUT that its time did not reach for all of
it, CODE_NOT_RUN that it cannot run here; any other that something is wrong.
"""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

CODE_PASS, CODE_FAIL, CODE_CUT, CODE_NOT_RUN = 0, 1, 3, 77
PASS, FAIL, CUT, NOT_RUN = "pass", "fail", "cut", "not run"
OUTCOMES = {CODE_PASS: PASS, CODE_CUT: CUT, CODE_NOT_RUN: NOT_RUN}


@dataclass(frozen=True)
class Part:
    """A command and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Verdict:
    """What became of a part."""

    outcome: str  # PASS, FAIL, CUT or NOT_RUN
    seconds: float
    reason: str  # in a line: the last thing that the part said, or why it did not go on


def run_part(
    part: Part, left_s: float, log: Path, environment: Mapping[str, str], say: Callable[[str], None]
) -> Verdict:
    """Run a part for no longer than its limit and what is left; each line that it writes is said and kept in `log`."""
    if left_s <= 0:
        return Verdict(NOT_RUN, 0.0, "no time was left")
    limit_s = min(part.limit_s, left_s)
    began_s = time.monotonic()
    process = subprocess.Popen(
        part.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env=dict(environment),
    )  # fmt: skip
    last_lines: list[str] = []
    reader = threading.Thread(target=_pass_on_lines, args=(process, log, say, last_lines), daemon=True)
    reader.start()
    try:
        code = process.wait(limit_s)
        was_cut = False
    except subprocess.TimeoutExpired:
        code = CODE_CUT
        was_cut = True
    finally:
        end_process_family(process)
    reader.join(timeout=5.0)  # whoever else holds the pipe is of no interest
    seconds = time.monotonic() - began_s
    if was_cut:
        return Verdict(CUT, seconds, f"it was not done after {limit_s:.0f} s")
    reason = last_lines[-1] if last_lines else "it said nothing"
    if code not in (CODE_PASS, CODE_FAIL, CODE_CUT, CODE_NOT_RUN):
        reason = f"exit code {code}: {reason}"
    return Verdict(OUTCOMES.get(code, FAIL), seconds, reason)


def _pass_on_lines(process: subprocess.Popen[str], log: Path, say: Callable[[str], None], last: list[str]) -> None:
    assert process.stdout is not None
    with log.open("w", encoding="utf-8") as file, process.stdout as lines:
        for line in lines:
            file.write(line)
            file.flush()
            say(line.rstrip("\n"))
            if line.strip():
                last[:] = [line.strip()]


def end_process_family(process: subprocess.Popen[str]) -> None:
    """Kill it and all that it started, which a part that hangs would not do when it is asked to."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.kill()
    for child in family:
        with contextlib.suppress(psutil.Error):  # which also sees that a number is another process's by now
            child.kill()
    process.wait()


def find_exit_code(verdicts: Sequence[Verdict]) -> int:
    """Of all parts together: a failure outweighs what was cut short or not run."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if FAIL in outcomes:
        return CODE_FAIL
    if outcomes & {CUT, NOT_RUN} or not outcomes:
        return CODE_CUT
    return CODE_PASS
