"""Runs that are made in turn, kept, and not repeated."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sweep
from benchmarks.contenders import Contender
from benchmarks.launchers import Launcher
from benchmarks.loss_curves import Entry
from benchmarks.peers import PeerUnavailable
from benchmarks.watching import GRACE_S, TrainerRecord, watch_trainer
from smoltrain.errors import TrainingStopped

TRAINER = """
import json, os, sys, time
lines, rate, calls = sys.argv[1], float(sys.argv[2]), sys.argv[3]
with open(calls, "a") as file:
    file.write(f"{rate:g} ")
if rate == 9:
    sys.exit("ValueError: diverged")
with open(lines, "a") as file:
    for step in range(1, 13):
        file.write(json.dumps({"step": step, "train/loss_nats_per_token": 9.0}) + "\\n")
        if step % 4 == 0:
            file.write(json.dumps({"step": step, "validation/loss_nats_per_token": rate + 1 / step}) + "\\n")
            file.flush()
        if step == 8 and rate == 1 and os.path.exists(calls + ".hang"):
            time.sleep(600)
"""


def make_contender(tmp_path: Path, name: str, *rates: float) -> Contender:
    def launch(rate: float) -> Launcher:
        if rate == 8:
            raise PeerUnavailable("it is not for this machine")
        calls = str(tmp_path / "calls")
        return lambda folder: (
            [sys.executable, "-c", TRAINER, str(folder / "lines"), str(rate), calls], folder / "lines", {},
        )  # fmt: skip

    return Contender(name, 12, rates, launch)


def test_trainers_run_in_turn_and_a_finished_run_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    contenders = [make_contender(tmp_path, "smoltrain adamw, 12 steps", 1.0, 2.0), make_contender(tmp_path, "b", 3.0)]
    runs, failed = sweep.run_sweep(contenders, 4, tmp_path, cuda=False)
    assert (tmp_path / "calls").read_text() == "1 3 2 "
    assert failed == {}
    assert {name: list(found) for name, found in runs.items()} == {
        "smoltrain adamw, 12 steps": [1.0, 2.0], "b": [3.0],
    }  # fmt: skip
    assert [found.loss for found in runs["b"][3.0].evaluations] == [3 + 1 / 4, 3 + 1 / 8, 3 + 1 / 12]
    contenders.append(make_contender(tmp_path, "c", 4.0))
    again, _ = sweep.run_sweep(contenders, 4, tmp_path, cuda=False)
    assert (tmp_path / "calls").read_text() == "1 3 2 4 "
    assert again["b"] == runs["b"]
    assert "kept from smoltrain-adamw-12-steps-1.json" in capsys.readouterr().out


def test_a_rate_that_fails_says_why_and_is_tried_again(tmp_path: Path):
    contenders = [make_contender(tmp_path, "a", 1.0, 8.0, 9.0)]
    for _ in range(2):
        runs, failed = sweep.run_sweep(contenders, 4, tmp_path, cuda=False)
        assert list(runs["a"]) == [1.0]
        assert failed["a", 8.0] == "it is not for this machine"
        assert failed["a", 9.0].startswith("0 of 12 steps, 0 of 3 evaluations, then exit code 1; ValueError: diverged")
        assert "ValueError: diverged" in (tmp_path / "runs" / "a-9.log").read_text()
    assert (tmp_path / "calls").read_text() == "1 9 9 "


def test_the_best_rates_are_timed_up_to_the_loss_and_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    contenders = [make_contender(tmp_path, "a", 1.0, 2.0), make_contender(tmp_path, "b", 3.0)]
    runs, _ = sweep.run_sweep(contenders, 4, tmp_path, cuda=False)
    entries = [Entry(name, 12, found, []) for name, found in runs.items()]
    (tmp_path / "calls.hang").touch()  # whoever waits for more than 8 steps waits for long
    graces_s: list[float] = []

    def watch(*words: Any, grace_s: float, **named: Any) -> TrainerRecord:
        graces_s.append(grace_s)
        return watch_trainer(*words, grace_s=grace_s, **named)

    monkeypatch.setattr(sweep, "watch_trainer", watch)
    timed = sweep.time_best_runs(contenders, entries, 1.2, 4, 2, tmp_path, cuda=False)
    assert graces_s == [0.0, GRACE_S] * 2, "whoever is stopped on the way is not waited for"
    assert (tmp_path / "calls").read_text() == "1 3 2 " + "1 3 " * 2
    assert [len(run.losses) for run in timed[0].timed] == [8, 8], "1 + 1/8 is below 1.2"
    assert [len(run.losses) for run in timed[1].timed] == [12, 12], "which never gets there"
    assert timed[0].runs == entries[0].runs
    broken = [make_contender(tmp_path, "a", 9.0)]
    entries = [Entry("a", 12, {9.0: runs["a"][1.0]}, [])]
    with pytest.raises(TrainingStopped, match="a, which had run, failed"):
        sweep.time_best_runs(broken, entries, 1.2, 4, 1, tmp_path, cuda=False)


def test_a_kept_run_is_read_as_it_was_written(tmp_path: Path):
    contenders = [make_contender(tmp_path, "a", 1.0)]
    runs, _ = sweep.run_sweep(contenders, 4, tmp_path, cuda=False)
    file = tmp_path / "runs" / "a-1.json"
    assert sweep.read_run(file) == runs["a"][1.0]
    assert isinstance(sweep.read_run(file), TrainerRecord)
    assert json.loads(file.read_text())["trainer"] == "a"
