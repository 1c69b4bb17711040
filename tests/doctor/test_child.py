"""Processes of their own: how they end, and that none is left."""

import sys
import time

import psutil
import pytest

from smoltrain.doctor import child

LEAVES_A_CHILD = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


def run(code: str, limit_s: float = 20.0) -> child.ChildResult:
    return child.await_child(child.start_child(["-S", "-c", code], child.child_environment()), limit_s)


def test_how_a_process_ended_is_told() -> None:
    assert run("print('x')") == child.ChildResult(0, "x\n", "")
    failed = run("import sys; sys.exit('one\\nno libcuda.so')")
    assert failed.describe_failure(20) == "the process ended with code 1: no libcuda.so"
    killed = run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert killed.describe_failure(20) == "the process was ended by SIGSEGV"


def test_one_that_hangs_is_killed_with_its_children() -> None:
    process = child.start_child(["-S", "-c", LEAVES_A_CHILD], child.child_environment())
    assert process.stdout is not None
    grandchild = psutil.Process(int(process.stdout.readline()))
    result = child.await_child(process, 0.1)
    assert (result.code, result.describe_failure(0.1)) == (None, "no answer within 0.1 s")
    deadline = time.monotonic() + 20
    while grandchild.is_running() and grandchild.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_command_that_is_not_there_or_fails_says_nothing() -> None:
    assert child.run_command(["no-such-program"], 5) is None
    assert child.run_command([sys.executable, "-S", "-c", "import sys; sys.exit(3)"], 20) is None
    assert child.run_command(["sleep", "10"], 0.05) is None
    assert child.run_command(["echo", "x"], 20) == "x\n"


def test_the_environment_has_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    seen = child.child_environment(RANK="1")
    assert (seen["RANK"], "MASTER_PORT" in seen, "PATH" in seen) == ("1", False, True)
