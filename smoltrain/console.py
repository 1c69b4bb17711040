"""Guarded stdout and stderr: losing them costs no run. A closed pipe or terminal, a full disk, a narrow encoding.

`guard_console` puts streams in their place that every writer of the process then uses, libraries too. One that cannot
be written to any more is dropped: it leads to /dev/null from then on, also for native code and for child processes.
"""

import contextlib
import io
import os
import select
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

NAMES = ("stdin", "stdout", "stderr")  # by file descriptor
LOST_VARIABLE = "SMOLTRAIN_CONSOLE_LOST"  # tells child processes what they cannot find out
TERMINAL_VARIABLE = "SMOLTRAIN_TERMINAL"  # the file descriptor by which this process takes the terminal over
TAKE_OVER_S = 2.0  # for a parent to erase its line; one that stands still holds nobody up
_warnings: list[str] = []
_faults: dict[int, OSError] = {}  # by file descriptor: why what was written to it is lost
_terminal_lenders: list[socket.socket] = []  # whom to ask for the terminal, until somebody has


def guard_console() -> None:
    """Guard this process's streams. To be called before anything that stays opens a file.

    Python that was told to take the words of its command line for ASCII begins again, in its UTF-8 mode.
    """
    if sys.getfilesystemencoding() == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    _borrow_terminal()
    lost_by_parent = os.environ.get(LOST_VARIABLE)
    if lost_by_parent:
        _warnings.append(lost_by_parent)
    closed = [number for number in range(len(NAMES)) if not _is_open(number)]
    for number in closed:  # as daemons leave it: the next file to be opened would be taken for it
        os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(number, True)
    _redirect_to_null([number for number in closed if number], "closed before the start")
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is sys.__stdout__:  # nobody has put another one there
        sys.stdout = open_guarded_stream(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = open_guarded_stream(2, sys.stderr)


def take_console_warnings() -> Iterator[str]:
    """What was lost since the last call, a line each."""
    while _warnings:
        yield _warnings.pop(0)


def find_stdout_fault() -> str | None:
    """Why what was printed is lost; None where it is not, or where its reader wanted no more, as `| head` does."""
    sys.stdout.flush()
    error = _faults.get(1)
    if error is None or isinstance(error, BrokenPipeError):
        return None
    return error.strerror or str(error)


@contextlib.contextmanager
def write_console_to(path: Path) -> Iterator[io.TextIOWrapper]:
    """While the block runs, what this process and its children print goes to the end of a file.

    The block gets a stream to where this process's file descriptor 1 led before, for a moving line.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    screen = open_guarded_stream(kept[0], sys.stdout)
    output = open_guarded_stream(1, sys.stdout)
    errors = open_guarded_stream(2, sys.stderr)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for number in (1, 2):
            os.dup2(file, number)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            yield screen
    finally:
        for stream in (output, errors, screen):
            stream.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
        os.close(file)


def open_guarded_stream(number: int, before: TextIO | None) -> io.TextIOWrapper:
    """A stream to this file descriptor; what its encoding has no letters for is spelled as Python spells it: \\xf6."""
    buffer = io.BufferedWriter(_GuardedFile(number, "w", closefd=False))  # pyright: ignore[reportArgumentType]
    encoding = (before and before.encoding) or "utf-8"
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)


class _GuardedFile(io.FileIO):
    """A file descriptor whose writes never fail."""

    def write(self, data: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The number of bytes that are written, or were dropped."""
        take_terminal()
        while True:
            try:
                written: int | None = super().write(data)
            except OSError as error:
                _faults[self.fileno()] = error
                _redirect_to_null([self.fileno()], error.strerror or str(error))
                return len(data)
            if written is not None:
                return written
            select.select([], [self], [], 1.0)  # a pipe that somebody has set not to block, and that is full


def take_terminal() -> None:
    """Before the first character: the parent that shows a moving line (launch/terminal_loan.py) erases it.

    Whoever is asked closes its end, which all of its children see; what native code writes asks nobody.
    """
    while _terminal_lenders:
        with contextlib.suppress(OSError), _terminal_lenders.pop() as lender:
            lender.settimeout(TAKE_OVER_S)
            lender.send(b"?")
            lender.recv(1)


def _borrow_terminal() -> None:
    """Remember whom to ask for the terminal; children of this process need not."""
    number = os.environ.pop(TERMINAL_VARIABLE, "")
    if number:
        with contextlib.suppress(OSError):
            _terminal_lenders.append(socket.socket(fileno=int(number)))
            os.set_inheritable(int(number), False)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _redirect_to_null(numbers: list[int], why: str) -> None:
    """From now on these file descriptors lead to /dev/null, which is said once somebody can say it."""
    for number in numbers:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
    if numbers:
        names = " and ".join(NAMES[number] if number < len(NAMES) else "the terminal" for number in numbers)
        os.environ[LOST_VARIABLE] = f"the console is dropped: {names} cannot be written to ({why}); all else goes on"
        _warnings.append(os.environ[LOST_VARIABLE])
