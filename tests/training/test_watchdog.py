"""A hang ends by itself, with the rank, the place and the stacks named; whatever shows signs of life goes on."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from smoltrain.distributed.world import open_world
from smoltrain.errors import FAULT
from smoltrain.training import watchdog
from smoltrain.training.watchdog import HangReport, Watchdog, describe_hang
from tests.zygote import zygote

# ---- two real ranks, one of which hangs outside of the reduction that the other waits in

HANGS = {
    "waits": lambda: time.sleep(600),
    "holds the interpreter's lock": lambda: ctypes.PyDLL(None).sleep(600),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def train_until_it_hangs(logs: Path, how: str) -> None:
    """What each rank does."""
    watchdog.BACKSTOP_S = 1.0
    watchdog.LAST_WORD_S = 1.0
    world = open_world("cpu")
    with contextlib.closing(Watchdog(logs, world.rank, world.size, limit_s=1.5)) as dog:
        for step in (1, 2, 3):
            dog.begin_step(step)
            dog.mark("data")
            if step == 3 and world.rank == 1:
                HANGS[how]()
            dog.mark("reduction")
            world.barrier()


@pytest.mark.parametrize("how", ["waits", *(pytest.param(how, marks=pytest.mark.slow) for how in [*HANGS][1:])])
def test_a_rank_that_hangs_is_named_and_both_leave(tmp_path: Path, how: str) -> None:
    logs = tmp_path / "logs"
    ranks = zygote().fork(2, tmp_path / "log", train_until_it_hangs, logs, how)
    try:
        states = ranks.wait(lambda states: states[0] == FAULT)
        if how == "is stopped":
            assert states[1] == "stopped"
            ranks.kill(1)
        ended = ranks.end()
    finally:
        ranks.kill()
    [said] = [line for line in ranks.text().splitlines() if line.startswith("error: no sign of life ")]
    assert f"the stacks are in {logs}/hang-rank*.txt" in said
    waiting = (logs / "hang-rank0.txt").read_text()
    assert "step: 3\n" in waiting
    assert "place: reduction\n" in waiting
    assert "in_collective: True\n" in waiting
    assert "in barrier" in waiting, "the stack"
    if how != "waits":
        assert re.match(r"error: no sign of life for \d s: rank 1 wrote nothing: it is stopped or dead; ", said)
        assert not (logs / "hang-rank1.txt").exists()
    else:
        assert re.match(
            r"error: no sign of life for \d s: rank 1 stands in 'data' of step 3, at \S+:\d+ \(<lambda>\); ", said
        )
        hanging = (logs / "hang-rank1.txt").read_text()
        assert "rank: 1 of 2" in hanging
        assert "in train_until_it_hangs" in hanging, "the stack"
        assert ranks.text() == f"{said}\n", "one line for both"
        assert ended == [FAULT, FAULT]
    if how == "holds the interpreter's lock":
        told = "error: process \\d+ hangs in native code for 2 s and is ended; its stacks:\n"
        assert re.search(told, ranks.text())
        assert "in train_until_it_hangs" in ranks.text(), "the stack, on the console"
        assert ended == [FAULT, -signal.SIGABRT]


# ---- one rank


def run(code: str, logs: Path) -> subprocess.CompletedProcess[str]:
    head = "import sys, time; from pathlib import Path; from smoltrain.training.watchdog import Watchdog\n"
    command = [sys.executable, "-c", head + code, str(logs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_signs_of_life_keep_it_quiet_and_close_ends_it(tmp_path: Path) -> None:
    code = """
dog = Watchdog(Path(sys.argv[1]), 0, 1, limit_s=0.6)
time.sleep(0.9)  # nothing has begun
dog.begin_step(1)
for _ in range(18):
    time.sleep(0.05)
    dog.mark("data")
dog.close()
time.sleep(0.9)
print("done")
"""
    ended = run(code, tmp_path / "logs")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("all_are", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_while_a_rank_is_suspended_no_time_passes(tmp_path: Path, all_are: bool) -> None:
    code = """
watchdog.BACKSTOP_S = 0.2
dog = watchdog.Watchdog(Path(sys.argv[1]), 0, 1, limit_s=2)  # half a second of it is its own, another a busy machine's
dog.begin_step(1)
time.sleep(0.2)
print("begun", flush=True)
time.sleep(1)
dog.close()
print("done", flush=True)
"""
    head = "import sys, time; from pathlib import Path; from smoltrain.training import watchdog\n"
    process = subprocess.Popen([sys.executable, "-c", head + code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    rank = psutil.Process(process.pid)
    [beside] = rank.children()
    suspended = [rank, beside] if all_are else [rank]
    for one in suspended:
        one.suspend()
    time.sleep(3)
    for one in suspended:
        one.resume()
    assert process.communicate(timeout=30)[0] == "done\n"
    assert process.returncode == 0
    assert not beside.is_running(), "it ends with the watch"


@pytest.mark.parametrize(("limit_s", "waits_s", "code"), [(0, 1, 0), (0.5, 60, FAULT)])
def test_a_limit_of_0_is_none(tmp_path: Path, limit_s: float, waits_s: float, code: int) -> None:
    begun = f"dog = Watchdog(Path(sys.argv[1]), 0, 1, limit_s={limit_s}); dog.begin_step(1); time.sleep({waits_s}); "
    assert run(f"{begun}dog.close()", tmp_path).returncode == code


def test_the_report_of_an_earlier_life_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    old = tmp_path / "hang-rank1.txt"
    old.write_text(HangReport(9, 9, "data", "x.py:1 (f)", False).to_text())
    before = old.stat().st_mtime - 60
    os.utime(old, (before, before))
    code = "dog = Watchdog(Path(sys.argv[1]), 0, 2, limit_s=0.5); dog.begin_step(1); time.sleep(60)"
    ended = run(code, tmp_path)
    assert ended.returncode == FAULT
    assert "rank 1 wrote nothing" in ended.stderr


def test_a_folder_that_cannot_be_written_does_not_keep_the_rank_alive(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    code = "dog = Watchdog(Path(sys.argv[1]), 0, 1, limit_s=0.5); dog.begin_step(7); time.sleep(60)"
    ended = run(code, tmp_path / "logs")
    assert ended.returncode == FAULT
    assert "error: rank 0 hangs and cannot say so in" in ended.stderr
    assert 'File "<string>", line 2 in <module>' in ended.stderr, "the stacks, on the console instead"


# ---- who is named


def report(step: int, marks: int, place: str, in_collective: bool = False) -> HangReport:
    return HangReport(step, marks, place, f"smoltrain/training/step.py:{step} (f)", in_collective)


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        # the one that has come less far, even if the others stand in no reduction that Python knows of (NCCL)
        ([report(5, 3, "backward"), report(5, 2, "forward")], ["rank 1 stands in 'forward' of step 5"]),
        ([report(6, 1, "data", True), report(5, 7, "update")], ["rank 1 stands in 'update' of step 5"]),
        # the same mark: who waits for nobody
        ([report(5, 1, "data", True), report(5, 1, "data")], ["rank 1 stands in 'data' of step 5"]),
        ([report(5, 4, "reduction"), report(5, 4, "reduction")], ["all ranks wait for each other in step 5"]),
        ([report(5, 4, "backward")], ["rank 0 stands in 'backward' of step 5, at smoltrain/training/step.py:5 (f)"]),
        # who says nothing, and who is behind
        ([report(5, 3, "backward"), None], ["rank 1 wrote nothing: it is stopped or dead"]),
        ([report(5, 3, "b"), None, report(5, 1, "a")], ["rank 2 stands in 'a'", "rank 1 wrote nothing"]),
    ],
)
def test_the_message_names_whom_the_others_wait_for(reports: list[HangReport | None], said: list[str]) -> None:
    there = {rank: r for rank, r in enumerate(reports) if r}
    line = describe_hang(there, len(reports), 900.4, Path("logs"))
    assert "\n" not in line
    for words in said:
        assert words in line
    named = {int(rank) for rank in re.findall(r"rank (\d)", line)}
    assert named == {int(rank) for words in said for rank in re.findall(r"rank (\d)", words)}


def test_ranks_whose_logs_are_elsewhere_are_not_said_to_be_dead() -> None:
    line = describe_hang({0: report(5, 3, "backward")}, 3, 900.4, Path("logs"), frozenset({1, 2}))
    assert "ranks 1, 2 write where they stand on their own machines" in line
    assert "dead" not in line


def test_a_report_survives_its_file() -> None:
    whole = report(12, 3, "a: strange place", in_collective=True)
    assert HangReport.from_text("rank: 1\n" + whole.to_text() + "\nThread 0x1 (most recent call first):\n") == whole
