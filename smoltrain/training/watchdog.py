"""A watchdog on each rank: after too long without a sign of life it writes down where the rank stands, and all leave.

Ranks meet in reductions, so one that hangs stops them all, and each finds its own last sign too old at about the same
time. They learn of each other through the files that they write, as no collective can be trusted then.
"""

import contextlib
import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smoltrain.distributed.awake_clock import AwakeClock
from smoltrain.distributed.peers import leave_peers
from smoltrain.errors import FAULT

TICK_S = 1.0  # between two looks at the last sign of life
REPORTS_TIMEOUT_S = 30.0  # for the other ranks to write where they stand: some may still have gone on for a while
LAST_WORD_S = 5.0  # launchers kill all ranks when one has left: the one that speaks leaves first
BACKSTOP_S = 10.0  # beyond the limit, for a rank whose threads cannot run at all
STDERR = 2


@dataclass(frozen=True)
class HangReport:
    """Where a rank stands: `marks` signs of life since the step began, the last at `place`, and its innermost line."""

    step: int
    marks: int
    place: str
    line: str
    in_collective: bool  # waiting for other ranks, as far as the main thread's Python frames tell

    def to_text(self) -> str:
        """One `key: value` per line."""
        return "".join(f"{key}: {value}\n" for key, value in vars(self).items())

    @staticmethod
    def from_text(text: str) -> "HangReport":
        """The inverse; further lines are passed over."""
        values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        return HangReport(
            step=int(values["step"]),
            marks=int(values["marks"]),
            place=values["place"],
            line=values["line"],
            in_collective=values["in_collective"] == "True",
        )


class Watchdog:
    """Watches from the first `begin_step` to `close`; `logs` is a folder that all ranks share. limit_s 0: never.

    Its thread needs the interpreter's lock; a hang that never gives it back (native code) is what the process beside it
    (backstop.py) ends. While all ranks are suspended no time passes. One that is stopped alone hangs for the others.
    """

    def __init__(
        self, logs: Path, rank: int, size: int, limit_s: float, unseen: frozenset[int] = frozenset()
    ) -> None:  # fmt: skip
        """`unseen` are ranks of machines with run folders of their own, whose reports nobody here can read."""
        self._logs = logs
        self._unseen = unseen
        self._rank = rank
        self._size = size
        self._limit_s = limit_s
        self._opened = time.time()
        self._last = (0, 0, "")  # step, marks, place: one object, so always of one moment
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin_step(self, step: int) -> None:
        """A step begins; the first one starts the watch."""
        self._last = (step, 0, "begin")
        if self._limit_s and not self._thread:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def mark(self, place: str) -> None:
        """A sign of life: the rank enters this place now. Costs less than a microsecond."""
        step, marks, _ = self._last
        self._last = (step, marks + 1, place)

    @property
    def place(self) -> tuple[int, str]:
        """The step, and where in it the last sign of life came from."""
        step, _, place = self._last
        return step, place

    def close(self) -> None:
        """End the watch. Where a hang was found already the process ends here: whoever leaves first breaks the others'
        connections, and their errors must neither bury the one line that counts nor forestall it.
        """
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        faulthandler.enable(STDERR)
        with self._open_backstop() as pulse:
            silence = self._wait_for_silence(pulse)
        if silence:
            self._report_and_exit(silence)

    def _wait_for_silence(self, pulse: int) -> float:
        """Seconds without a sign of life, when they have become too many; 0 when the watch is closed."""
        tick_s = min(TICK_S, self._limit_s / 12)  # so that a suspension counts as a quarter of the limit at most
        clock = AwakeClock(3 * tick_s)
        seen = self._last
        since = 0.0  # on the clock
        while not self._closed.wait(tick_s):
            with contextlib.suppress(OSError):  # whoever ended the process beside this one did not mean this one
                os.write(pulse, b".")
            now = clock.now()
            if self._last is not seen:
                seen = self._last
                since = now
            if now - since >= self._limit_s:
                return now - since
        return 0.0

    @contextlib.contextmanager
    def _open_backstop(self) -> Iterator[int]:
        """The file descriptor through which the process beside this one hears that this thread runs."""
        script = str(Path(__file__).with_name("backstop.py"))
        command = [sys.executable, "-I", "-S", script, str(self._limit_s + BACKSTOP_S)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)
            yield process.stdin.fileno()

    def _report_and_exit(self, silence: float) -> None:
        """Write, wait for the others to write, let the lowest rank that did so speak; then the process ends."""
        try:
            faulthandler.dump_traceback_later(REPORTS_TIMEOUT_S + LAST_WORD_S + BACKSTOP_S, exit=True, file=STDERR)
            self._write_report(silence)
            reports = self._collect_reports()
            if self._rank == min(reports, default=self._rank):
                os.write(STDERR, f"{describe_hang(reports, self._size, silence, self._logs, self._unseen)}\n".encode())
            else:
                time.sleep(LAST_WORD_S)
        except OSError as error:  # the disk itself may be what hangs or fails
            os.write(STDERR, f"error: rank {self._rank} hangs and cannot say so in {self._logs}: {error}\n".encode())
            faulthandler.dump_traceback(STDERR)
        finally:
            leave_peers(FAULT)  # each rank says for itself that it hangs
            os._exit(FAULT)

    def _path(self, rank: int) -> Path:
        return self._logs / f"hang-rank{rank}.txt"

    def _write_report(self, silence: float) -> None:
        """The report, and the stacks of all threads; whole or not at all for those who read it."""
        step, marks, place = self._last
        line, in_collective = _locate_main_thread()
        path = self._path(self._rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
            file.write(f"rank: {self._rank} of {self._size}, process {os.getpid()} on {socket.gethostname()}\n")
            file.write(HangReport(step, marks, place, line, in_collective).to_text())
            file.write(f"seconds without a sign of life: {silence:.1f}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        path.with_suffix(".tmp").replace(path)

    def _collect_reports(self) -> dict[int, HangReport]:
        """The reports of all ranks that wrote one in time, by rank."""
        deadline = time.monotonic() + min(REPORTS_TIMEOUT_S, self._limit_s)
        reports: dict[int, HangReport] = {}
        while True:
            for rank in range(self._size):
                path = self._path(rank)
                if rank in reports or not path.exists() or path.stat().st_mtime < self._opened:  # of an earlier life
                    continue
                reports[rank] = HangReport.from_text(path.read_text(encoding="utf-8"))
            if len(reports) == self._size - len(self._unseen) or time.monotonic() >= deadline:
                return reports
            time.sleep(0.1)


def describe_hang(
    reports: dict[int, HangReport], size: int, silence: float, logs: Path, unseen: frozenset[int] = frozenset()
) -> str:  # fmt: skip
    """The one line for the user: who stands where of those that the others wait for.

    These are the ranks that wrote nothing and those that have come less far than others. When all stand at the same
    mark, they are the ones outside of any reduction.
    """
    how_far = {rank: (report.step, report.marks) for rank, report in reports.items()}
    behind = [rank for rank in how_far if how_far[rank] < max(how_far.values())]
    if not behind and len(reports) == size:
        behind = [rank for rank, r in reports.items() if not (r.in_collective or r.place == "reduction")]
    seen = {*reports, *unseen}
    named = [
        f"rank {rank} stands in {reports[rank].place!r} of step {reports[rank].step}, at {reports[rank].line}"
        for rank in sorted(behind)
    ]
    named += [f"rank {rank} wrote nothing: it is stopped or dead" for rank in range(size) if rank not in seen]
    if unseen:
        named.append(f"ranks {', '.join(map(str, sorted(unseen)))} write where they stand on their own machines")
    who = "; ".join(named) or f"all ranks wait for each other in step {max(how_far.values())[0]}"
    return (
        f"error: no sign of life for {silence:.0f} s: {who}; the stacks are in {logs / 'hang-rank*.txt'}; "
        "the same command goes on from the last checkpoint"
    )


def _locate_main_thread() -> tuple[str, bool]:
    """The innermost Python line of the main thread, and whether it is inside a collective of torch.distributed."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    line = "an unknown line"
    in_collective = False
    if frame:
        path = "/".join(Path(frame.f_code.co_filename).parts[-2:])
        line = f"{path}:{frame.f_lineno} ({frame.f_code.co_name})"
    while frame:
        in_collective |= "/torch/distributed/" in frame.f_code.co_filename
        frame = frame.f_back
    return line, in_collective
