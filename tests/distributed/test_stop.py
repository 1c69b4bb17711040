"""A rank that is to stop knows it: signals, and launchers that are gone, under every way to start."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from smoltrain.distributed import stop
from smoltrain.distributed.stop import DEEPSPEED_LAUNCHER, STOP_SIGNALS, StopFlag
from tests.distributed.test_world import environment, start

FLAG = """
import sys, time
from smoltrain.distributed.stop import StopFlag
flag = StopFlag()
flag.listen()
print("ready", flag.is_raised(), flush=True)
deadline = time.monotonic() + float(sys.argv[1]) if len(sys.argv) > 1 else time.monotonic() + 30
while not flag.is_raised() and time.monotonic() < deadline:
    time.sleep(0.01)
print(flag.is_raised(), flag.reason, flush=True)
if flag.reason == "SIGINT":
    time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_raises_the_flag_and_ends_nothing(number: signal.Signals) -> None:
    process = start(FLAG)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready False\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == (f"True {number.name}\n", 0), err


def test_the_second_ctrl_c_leaves_at_once_but_an_echo_of_the_first_does_not() -> None:
    process = start(FLAG)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready False\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "True SIGINT\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


LISTEN = "import time\nfrom smoltrain.distributed.stop import StopFlag\nf = StopFlag()\nprint('up', flush=True)\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_loop_listens_a_signal_just_ends_the_rank(number: signal.Signals) -> None:
    code = LISTEN + "time.sleep(30)"
    process = start(code)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == -number


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("launched", "supervisor", "expected"),
    [(True, "dead", "True its launcher is gone"), (True, "the parent", "False None"), (False, "dead", "False None")],
)
def test_only_a_launched_rank_heeds_its_supervisor(launched: bool, supervisor: str, expected: str) -> None:
    pids = {"dead": str(dead_pid()), "the parent": str(os.getpid())}
    extra = {"SMOLTRAIN_SUPERVISOR": pids[supervisor]} | ({"LOCAL_RANK": "0"} if launched else {})
    out, err = start(FLAG.replace("30\n", "0.2\n", 1), **extra).communicate(timeout=30)
    assert out.splitlines()[-1].strip() == expected, err


# Starts a rank that writes what it found to OUT, and ends once it has said that it is up.
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True)
rank.stdout.readline()
if "--stay" in sys.argv:
    print("up", flush=True)
    rank.wait()
"""
RUNNER = """
import subprocess, sys
launcher = subprocess.Popen([sys.executable, *sys.argv[1:]])
launcher.wait()
"""
WRITES = FLAG.replace(
    "print(flag.is_raised(), flag.reason, flush=True)", "open(OUT, 'w').write(f'{flag.is_raised()} {flag.reason}\\n')"
)


def found(out: Path) -> str:
    """What the rank wrote."""
    deadline = time.monotonic() + 30
    while not (out.exists() and out.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("extra", "expected"), [({"LOCAL_RANK": "0"}, "True its launcher is gone\n"), ({}, "False None\n")]
)
def test_only_a_launched_rank_notices_that_its_parent_died(
    tmp_path: Path, extra: dict[str, str], expected: str
) -> None:
    out = tmp_path / "out"
    code = WRITES.replace("OUT", repr(str(out)))
    launcher = [sys.executable, "-c", LAUNCHER, code, "1" if not extra else "20"]
    subprocess.run(launcher, env=environment(**extra), check=True, timeout=60)
    assert found(out) == expected


@pytest.mark.parametrize(
    ("module", "expected"), [(DEEPSPEED_LAUNCHER, "True its launcher is gone\n"), ("another", "False None\n")]
)
def test_under_deepspeeds_launcher_the_runner_above_it_counts_too(tmp_path: Path, module: str, expected: str) -> None:
    out = tmp_path / "out"
    code = WRITES.replace("OUT", repr(str(out)))
    launcher = ["-c", LAUNCHER, code, "20" if module == DEEPSPEED_LAUNCHER else "1", "--stay", module]
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, *launcher], env=environment(LOCAL_RANK="0"), stdout=subprocess.PIPE, text=True
    )
    assert runner.stdout is not None
    assert runner.stdout.readline() == "up\n"
    runner.kill()
    assert found(out) == expected
    runner.communicate()


def test_before_the_loop_listens_a_rank_leaves_with_its_launcher() -> None:
    code = LISTEN + "time.sleep(60)"
    command = [sys.executable, "-c", LAUNCHER.replace('"up"', "rank.pid"), code, "0", "--stay"]
    launcher = subprocess.Popen(command, env=environment(LOCAL_RANK="0"), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.communicate()
    with contextlib.suppress(psutil.NoSuchProcess):
        rank.wait(20)


def test_a_rank_that_was_an_orphan_before_it_looked_knows_it(tmp_path: Path) -> None:
    out, script = tmp_path / "out", tmp_path / "rank.py"
    late = "import os, sys, time\nwhile os.getppid() == int(sys.argv[2]): time.sleep(0.01)\n"
    late += "open(sys.argv[3], 'w').write(str(os.getppid()))\n"
    script.write_text(late + WRITES.replace("OUT", repr(str(out))))
    launcher = ["sh", "-c", '"$0" "$1" 20 $$ "$2" & ', sys.executable, str(script), str(tmp_path / "adopter")]
    subprocess.run(launcher, env=environment(LOCAL_RANK="0"), check=True, timeout=60, stdout=subprocess.DEVNULL)
    if found(tmp_path / "adopter") != "1":
        pytest.skip(
            "orphans are adopted by another process than the first here; the tests above kill a launcher that was seen"
        )
    assert found(out) == "True its launcher is gone\n"


@pytest.fixture
def program_flag(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopFlag]:
    """The flag of a run inside this very process, which gets its signals back."""
    monkeypatch.setattr(stop, "SIGINT_ECHO_S", -1.0)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    flag = StopFlag(owns_process=False)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before, "until it listens"
    yield flag
    flag.reason = None
    flag.close()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_in_a_program_the_second_interrupt_is_pythons_own(program_flag: StopFlag) -> None:
    program_flag.listen()
    program_flag.listen()  # as a rewind does
    signal.raise_signal(signal.SIGINT)
    assert (program_flag.is_raised(), program_flag.reason) == (True, "SIGINT")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    program_flag.close()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_in_another_thread_nothing_listens(program_flag: StopFlag) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=program_flag.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not program_flag.is_raised()


def test_a_program_is_not_ended_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # left over in its environment
    StopFlag(owns_process=False).close()
    assert "launcher" not in {thread.name for thread in threading.enumerate()}
