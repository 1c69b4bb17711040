"""A real command on a real terminal (a pty), and what stands on its screen in the end."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from rich.cells import cell_len

TIMEOUT_S = 240
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class TerminalSession:
    """A command whose console is a terminal of so many columns, as a shell starts it: Ctrl-C reaches it."""

    def __init__(self, command: list[str], folder: Path, columns: int, lines: int, **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        foreign = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
        own = {name: value for name, value in os.environ.items() if name not in foreign}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command], stdin=slave, stdout=slave, stderr=slave, cwd=folder,
            env=own | {"TERM": "xterm-256color"} | environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.raw = ""
        self._columns = columns

    def read_until(self, condition: Callable[[str], object]) -> None:
        """Read on until what was written is as wanted; or to the end."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition(self.raw):
            assert time.monotonic() < deadline, self.raw[-2000:]
            try:
                self.raw += os.read(self._master, 1 << 16).decode(errors="replace")
            except OSError:  # the last process has closed it
                return

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    def finish(self) -> int:
        """Read to the end; the exit code."""
        self.read_until(lambda _: False)
        os.close(self._master)
        return self.process.wait(TIMEOUT_S)

    @property
    def pictures(self) -> list[list[str]]:
        """What stood on the whole screen, picture after picture, of a command that draws on all of it; no colours."""
        drawn = self.raw.partition("\x1b[?1049l")[0]  # until the screen of before is back
        plain = re.sub(r"\x1b\[[0-9;?]*[A-GI-Za-z]", "", drawn.replace("\r", ""))
        return [[line.rstrip() for line in part.split("\n")] for part in plain.split("\x1b[H")[1:]]

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, above it too. Errors: AssertionError for a line that has wrapped.

        But for commands that are to be copied.
        """
        lines = [""]
        row = column = 0
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", self.raw):
            if part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part == "\r":
                column = 0
            elif part == "\x1b[2K":
                lines[row] = ""
            elif part == "\x1b[1A":
                row -= 1
            elif not part.startswith("\x1b"):
                before = lines[row].ljust(column)
                lines[row] = before[:column] + part + before[column + len(part) :]
                column += len(part)
                is_command = re.match(r"  \S*/bin/", lines[row])
                assert is_command or cell_len(lines[row].rstrip()) <= self._columns, f"wraps: {lines[row]!r}"
        return [line.rstrip() for line in lines]
