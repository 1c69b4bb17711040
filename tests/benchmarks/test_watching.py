"""Trainers watched from outside."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import watching
from tests.launches import wait_until

TRAINER = """
import json, os, subprocess, sys, time
lines, steps = sys.argv[1], int(sys.argv[2])
ballast = bytearray(64 << 20)
print("said on the way"); print("ValueError: what went wrong", flush=True)
for step in range(1, steps + 1):
    time.sleep(0.02)
    with open(lines, "a") as file:
        file.write(json.dumps({"step": step, "train/loss_nats_per_token": 10.0 - step}) + "\\n" + '{"cut')
        file.flush(); time.sleep(0.01); file.write(' short": 1}\\n'); file.flush()
        if step % 2 == 0:
            time.sleep(0.1)
            file.write(json.dumps({"step": step, "validation/loss_nats_per_token": 9.0}) + "\\n")
"""


def watch(folder: Path, steps: int, wanted: int, evaluations: int = 0) -> watching.TrainerRecord:
    lines = folder / "lines.jsonl"
    command = [sys.executable, "-c", TRAINER, str(lines), str(steps)]
    log = folder / "log"
    return watching.watch_trainer(command, lines, wanted, os.environ, log, cuda=False, evaluations=evaluations)


def test_a_trainer_is_watched_step_by_step(tmp_path: Path):
    seen = watch(tmp_path, 5, 5)
    assert seen.losses == [9.0, 8.0, 7.0, 6.0, 5.0]
    assert len(seen.step_s) == len(seen.waits_s) == 5
    assert seen.start_s == seen.step_s[0] > max(seen.step_s[1:]) > 0.02
    assert 0.06 < seen.peak_gib < 0.2, "Python and 64 MiB"
    assert seen.said == ["said on the way", "ValueError: what went wrong"]


def test_an_evaluation_is_no_part_of_a_step(tmp_path: Path):
    seen = watch(tmp_path, 4, 4, evaluations=2)
    assert [(found.step, found.loss) for found in seen.evaluations] == [(2, 9.0), (4, 9.0)]
    first, second = seen.evaluations
    assert min(first.seconds, second.seconds) > 0.08
    assert first.at_s == pytest.approx(sum(seen.step_s[:2]) + first.seconds)
    assert second.at_s == pytest.approx(first.at_s + sum(seen.step_s[2:4]) + second.seconds), "not in step 3"


def test_an_evaluation_that_is_not_told_is_missed(tmp_path: Path):
    with pytest.raises(watching.TrainerFailed, match="3 of 3 steps, 1 of 2 evaluations, then exit code 0"):
        watch(tmp_path, 3, 3, evaluations=2)


def test_a_trainer_that_ends_too_early_says_why(tmp_path: Path):
    with pytest.raises(watching.TrainerFailed, match="2 of 5 steps, then exit code 0; ValueError: what went wrong"):
        watch(tmp_path, 2, 5)


def test_a_trainer_that_stands_still_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watching, "STALL_S", 0.5)
    sleeper = [sys.executable, "-c", "import subprocess, sys; subprocess.run(['sleep', '77.125'])"]
    with pytest.raises(watching.TrainerFailed, match="no step for 0 s; it said nothing"):
        watching.watch_trainer(sleeper, tmp_path / "none", 1, os.environ, tmp_path / "log", cuda=False)
    wait_until(
        lambda: not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "77.125"]], 20
    )


def test_the_ranks_are_what_the_launcher_started_and_not_what_they_start():
    inner = "import os, subprocess; subprocess.run(['sleep', '5'])"
    code = f"""if True:
        import os, subprocess, sys
        start = lambda rank: subprocess.Popen([sys.executable, "-c", {inner!r}], env=os.environ | {{"RANK": rank}})
        [process.wait() for process in [start("0"), start("1")]]
        """
    plain = {key: value for key, value in os.environ.items() if key != "RANK"}
    launcher = subprocess.Popen([sys.executable, "-c", code], env=plain)
    try:
        wait_until(lambda: len(psutil.Process(launcher.pid).children(recursive=True)) == 4, 20)
        ranks = watching.find_rank_processes(launcher.pid)
        assert len(ranks) == 2
        assert {rank.ppid() for rank in ranks} == {launcher.pid}
        alone = subprocess.Popen(["sleep", "5"], env=plain)
        assert [rank.pid for rank in watching.find_rank_processes(alone.pid)] == [alone.pid]
        watching.end_process_tree(alone)
    finally:
        watching.end_process_tree(launcher)
    wait_until(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), 20)
