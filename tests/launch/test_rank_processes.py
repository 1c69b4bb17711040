"""Ranks that die, lose each other, get signals or are stopped, each in a moment. Whole runs: test_supervisor.py."""

import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from smoltrain.distributed.memory_limits import MAXRSS_UNIT
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED
from smoltrain.launch import rank_processes, supervisor
from smoltrain.launch.rank_processes import RankProcesses
from smoltrain.launch.signal_forwarder import SignalForwarder
from tests import launches

# A script that does as it is told stands in for smoltrain.launch.rank.
STAND_IN = """
import fcntl, os, signal, subprocess, sys, time
own = open(os.environ["RANK"], "w")
fcntl.flock(own, fcntl.LOCK_EX)
own.write("here")
own.flush()
other = open(str(1 - int(os.environ["RANK"])), "a+")
while not other.seek(0) and other.read() != "here":
    time.sleep(0.01)

def end(how):
    os._exit(how) if how >= 0 else os.kill(os.getpid(), -how)

def lose(other):  # the kernel lets go of a dead process's locks as it closes its sockets
    fcntl.flock(other, fcntl.LOCK_EX)
    os._exit(1)

exec(sys.argv[1 + int(os.environ["RANK"])])
"""
WAITS = "time.sleep(60)"
LOSES = "lose(other)"


@pytest.fixture
def signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SignalForwarder]:
    """What listens to this process's signals, while the script stands in for the ranks and they get little time."""
    (tmp_path / "rank.py").write_text(STAND_IN)
    monkeypatch.setattr(rank_processes, "RANK_COMMAND", [sys.executable, str(tmp_path / "rank.py")])
    monkeypatch.setattr(rank_processes, "NOTICE_S", 0.3)
    monkeypatch.setattr(rank_processes, "GRACE_S", 1.0)
    monkeypatch.chdir(tmp_path)
    listening = SignalForwarder()
    yield listening
    listening.close()


@pytest.mark.parametrize(
    ("first_rank", "second_rank", "said", "truth"),
    [
        ("end(0)", "end(0)", "None", DONE),
        ("end(75)", "time.sleep(0.5); end(75)", "rank 0 ended with code 75", STOPPED),
        ("end(2)", "time.sleep(0.5); end(2)", "rank 0 ended with code 2", BAD_INPUT),
        ("end(2)", LOSES, "rank 0 ended with code 2", BAD_INPUT),
        ("end(130)", WAITS, "rank 0 ended with code 130", INTERRUPTED),
        (WAITS, "end(1)", "rank 1 ended with code 1", FAULT),
        ("end(0)", "end(1)", "rank 1 ended with code 1", FAULT),
        (LOSES, "end(-signal.SIGKILL)", "rank 1 was ended by SIGKILL", FAULT),
        (WAITS, "end(-signal.SIGSEGV)", "rank 1 was ended by SIGSEGV", FAULT),
        (WAITS, "end(-40)", "rank 1 was ended by signal 40", FAULT),
        (LOSES, "end(-signal.SIGTERM)", "rank 1 was ended by SIGTERM", STOPPED),  # which a rank that trains survives
        (WAITS, "end(-signal.SIGUSR1)", "rank 1 was ended by SIGUSR1", STOPPED),
        (f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}", "end(1)", "rank 1 ended with code 1", FAULT),
    ],
)
def test_the_rank_that_died_first_tells_how_the_launch_ended(
    signals: SignalForwarder, first_rank: str, second_rank: str, said: str, truth: int
) -> None:
    first = RankProcesses([first_rank, second_rank], 2, "cpu").run(signals)
    assert str(first) == said
    assert (first.launch_code if first else DONE) == truth


@pytest.mark.parametrize(
    ("number", "code", "out", "err"),
    [
        (signal.SIGKILL, FAULT, "", "error: rank 1 was ended by SIGKILL; the same command goes on from the last check"),
        (signal.SIGTERM, STOPPED, "stopped, and nothing was lost; the same command goes on from there", ""),
    ],
)
def test_what_ranks_could_not_say_is_said_for_them(
    signals: SignalForwarder, capfd: pytest.CaptureFixture[str], number: int, code: int, out: str, err: str
) -> None:
    assert supervisor._launch_ranks(RankProcesses([WAITS, f"end(-{int(number)})"], 2, "cpu"), signals) == code
    said = capfd.readouterr()
    assert said.out.startswith(out)
    assert said.err.startswith(err)
    assert (bool(said.out), bool(said.err)) == (bool(out), bool(err))


def test_the_peak_memory_of_a_rank_that_died_is_its_own(
    signals: SignalForwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = os.wait4
    monkeypatch.setattr(os, "wait4", lambda *asked: (*wait(*asked)[:2], SimpleNamespace(ru_maxrss=asked[0])))
    ranks = RankProcesses([WAITS, "end(-signal.SIGKILL)"], 2, "cpu")
    first = ranks.run(signals)
    assert first is not None
    assert first.peak_bytes == ranks._processes[1].pid * MAXRSS_UNIT


def test_what_ranks_started_does_not_outlive_them(signals: SignalForwarder, tmp_path: Path) -> None:
    """Neither what would leave when asked, nor what would not."""
    start = "child = subprocess.Popen(['sh', '-c', 'trap \"{}\" TERM; while :; do sleep 0.1; done'])"
    write = "open('child' + os.environ['RANK'], 'w').write(str(child.pid)); end(0)"
    words = [f"{start.format('exit')}; {write}", f"{start.format(':')}; {write}"]
    assert RankProcesses(words, 2, "cpu").run(signals) is None
    for rank in "01":
        pid = int((tmp_path / f"child{rank}").read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_signal_reaches_all_ranks_as_it_is(signals: SignalForwarder, capfd: pytest.CaptureFixture[str]) -> None:
    said = "signal.signal(signal.SIGUSR1, lambda *_: end(75))"
    asks = "time.sleep(0.2); os.kill(os.getppid(), signal.SIGUSR1)"
    words = [f"{said}; {WAITS}", f"{said}; {asks}; {WAITS}"]
    assert supervisor._launch_ranks(RankProcesses(words, 2, "cpu"), signals) == STOPPED
    assert capfd.readouterr().out == "SIGUSR1: stopping; no step has begun\n"


SPEAKS = "from smoltrain.console import guard_console; guard_console(); print('rank', os.environ['RANK'], flush=True)"
BUSY = "; ".join(f"signal.signal(signal.{name}, signal.SIG_IGN)" for name in ("SIGTERM", "SIGHUP", "SIGINT"))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGTERM, "SIGTERM: stopping after this step, then saving"),
        (signal.SIGHUP, "SIGHUP: stopping after this step, then saving"),
        (signal.SIGINT, "stopping after this step, then saving; Ctrl-C again leaves at once"),
    ],
)
def test_a_signal_is_acknowledged_at_once_though_the_ranks_are_busy(
    signals: SignalForwarder, capfd: pytest.CaptureFixture[str], number: int, said: str
) -> None:
    asks = f"time.sleep(0.2); os.kill(os.getppid(), {int(number)}); time.sleep(0.2); print('step ends', flush=True)"
    words = [f"{BUSY}; {SPEAKS}; time.sleep(0.6); end(75)", f"{BUSY}; {SPEAKS}; {asks}; end(75)"]
    assert supervisor._launch_ranks(RankProcesses(words, 2, "cpu"), signals) == STOPPED
    told = capfd.readouterr().out.splitlines()
    assert sorted(told[:2]) == ["rank 0", "rank 1"]
    assert told[2:] == [said, "step ends"]


def test_a_signal_is_acknowledged_on_the_terminal_that_was_named(
    signals: SignalForwarder, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where stdout leads to a file, as in a grid of runs."""
    signals.close()
    seen = io.StringIO()
    listening = SignalForwarder(Console(file=seen))
    try:
        asks = "time.sleep(0.2); os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.2)"
        words = [f"{BUSY}; time.sleep(0.6); end(75)", f"{BUSY}; {asks}; end(75)"]
        assert supervisor._launch_ranks(RankProcesses(words, 2, "cpu"), listening) == STOPPED
    finally:
        listening.close()
    assert seen.getvalue() == "SIGTERM: stopping; no step has begun\n"
    assert "SIGTERM" not in capfd.readouterr().out


def test_the_second_ctrl_c_says_that_it_leaves(signals: SignalForwarder, capfd: pytest.CaptureFixture[str]) -> None:
    asks = "os.kill(os.getppid(), signal.SIGINT); time.sleep(0.2)"
    words = [f"{BUSY}; {WAITS}", f"{BUSY}; {asks}; {asks}; {WAITS}"]
    assert supervisor._launch_ranks(RankProcesses(words, 2, "cpu"), signals) == INTERRUPTED
    assert capfd.readouterr().out.splitlines() == [
        "stopping; no step has begun; Ctrl-C again leaves at once",
        "leaving at once",
        "left at once; the same command goes on from the last checkpoint",
    ]


def test_ctrl_z_stops_the_ranks_and_what_they_started(
    signals: SignalForwarder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process itself is not stopped here: what it would do is looked at instead."""
    found = []

    def stand_still(number: int) -> None:
        assert number == signal.SIGTSTP
        assert signal.getsignal(number) == signal.SIG_DFL
        launches.wait_until(lambda: len(states := [p.status() for p in seen()]) == 3 and set(states) == {"stopped"}, 10)
        found.append("stopped")

    def seen() -> list[psutil.Process]:
        return signals.list_processes()

    monkeypatch.setattr(signal, "raise_signal", stand_still)
    asks = "time.sleep(0.2); os.kill(os.getppid(), signal.SIGTSTP); time.sleep(0.3)"
    words = ["child = subprocess.Popen(['sleep', '60']); time.sleep(0.5); child.kill(); end(0)", f"{asks}; end(0)"]
    assert RankProcesses(words, 2, "cpu").run(signals) is None
    assert found == ["stopped"], "and went on, or they would not have ended"
    assert signal.getsignal(signal.SIGTSTP) == signals._on_ctrl_z


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.4])
def test_ctrl_c_while_a_rank_still_imports_shows_no_traceback(
    capfd: pytest.CaptureFixture[str], after_s: float
) -> None:
    ranks = RankProcesses(["quickstart"], 2, "cpu")  # of the real module
    ranks._start_processes()
    try:
        time.sleep(after_s)
        first = ranks._wait_for_exits([signal.SIGINT])
    finally:
        ranks._end_leftovers()
    assert first
    assert first.code == -signal.SIGINT
    assert capfd.readouterr().err == ""
