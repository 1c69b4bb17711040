"""The terminal goes from the supervisor to its ranks at the first character of one of them."""

import io
import os
import subprocess
import sys
import time

import pytest

from smoltrain.console import TERMINAL_VARIABLE
from smoltrain.launch.terminal_loan import TerminalLoan

SPEAKS = "import sys; from smoltrain.console import guard_console; guard_console(); print('here', file=sys.std{})"
SILENT = "from smoltrain.console import guard_console; guard_console()"


def child(loan: TerminalLoan, code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {TERMINAL_VARIABLE: str(loan.inherited)},
        pass_fds=(loan.inherited,), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_rank_speaks_once_the_line_is_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    loan = TerminalLoan("starting 2 ranks")
    ranks = [child(loan, SPEAKS.format("out")), child(loan, SPEAKS.format("err")), child(loan, SILENT)]
    drawn = sys.stdout
    assert ranks[2].communicate(timeout=20)[0] == b""
    assert not loan.is_taken, "who says nothing takes nothing"
    deadline = time.monotonic() + 20
    while not loan.is_taken:
        assert "\x1b[?25h" not in drawn.rich_proxied_file.getvalue()  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.02)
        assert all(rank.poll() is None for rank in ranks[:2]), "they wait"
        loan.poll()
    for rank in ranks[:2]:
        assert rank.communicate(timeout=20)[0] == b"here\n"
    assert isinstance(sys.stdout, io.StringIO)
    assert "starting 2 ranks ..." in sys.stdout.getvalue()
    assert sys.stdout.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
    loan.close()


def test_a_supervisor_that_is_gone_holds_nobody_up(capsys: pytest.CaptureFixture[str]) -> None:
    loan = TerminalLoan("starting 1 rank")
    rank = child(loan, SPEAKS.format("out"))
    loan.close()
    assert rank.communicate(timeout=20)[0] == b"here\n"
    assert capsys.readouterr().out == "", "nothing moves through a pipe"
