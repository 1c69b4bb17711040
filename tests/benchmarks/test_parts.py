"""Parts with a limit: what each verdict means, and that no part ends another."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.parts import CUT, FAIL, NOT_RUN, PASS, Part, Verdict, find_exit_code, run_part

FORKS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(60)
"""


def run(program: str, tmp_path: Path, limit_s: float = 60.0, left_s: float = 60.0) -> tuple[Verdict, list[str]]:
    said: list[str] = []
    part = Part("tried", (sys.executable, "-c", program), limit_s)
    return run_part(part, left_s, tmp_path / "log", {}, said.append), said


@pytest.mark.parametrize(
    ("program", "outcome", "reason"),
    [
        ("print('all is well')", PASS, "all is well"),
        ("print('off by one'); raise SystemExit(1)", FAIL, "off by one"),
        ("print('half'); raise SystemExit(3)", CUT, "half"),
        ("print('no GPU'); raise SystemExit(77)", NOT_RUN, "no GPU"),
        ("import os; print('so far', flush=True); os.kill(os.getpid(), 9)", FAIL, "exit code -9: so far"),
        ("", PASS, "it said nothing"),
    ],
)
def test_a_part_says_how_it_went(program: str, outcome: str, reason: str, tmp_path: Path) -> None:
    verdict, said = run(program, tmp_path)
    assert (verdict.outcome, verdict.reason) == (outcome, reason)
    assert (tmp_path / "log").read_text().splitlines() == said


@pytest.mark.slow
def test_a_part_that_hangs_is_cut_with_all_that_it_started(tmp_path: Path) -> None:
    verdict, said = run(FORKS, tmp_path, limit_s=60.0, left_s=4.0)
    assert verdict.outcome == CUT
    assert verdict.reason == "it was not done after 4 s"
    [word, pid] = said[0].split()
    assert word == "child"
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child of a part that was cut is alive"
        time.sleep(0.05)


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    verdict, said = run("print('started')", tmp_path, left_s=0.0)
    assert (verdict.outcome, said) == (NOT_RUN, [])
    assert not (tmp_path / "log").exists()


def test_the_exit_code_is_that_of_the_worst() -> None:
    def code(*outcomes: str) -> int:
        return find_exit_code([Verdict(outcome, 0.0, "") for outcome in outcomes])

    assert code(PASS, PASS) == 0
    assert code(PASS, FAIL, CUT) == 1
    assert code(PASS, CUT) == 3
    assert code(PASS, NOT_RUN) == 3
    assert code() == 3, "nothing that was tried is nothing that passed"
