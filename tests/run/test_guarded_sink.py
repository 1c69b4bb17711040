"""The guard of TensorBoard and its like, with backends that fail, hang, or were left behind by a kill."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import UserError
from smoltrain.run import guarded_sink
from smoltrain.run.guarded_sink import SINKS_FILE, check_sinks
from smoltrain.run.sink import BackendStart
from smoltrain.run.track import Tracker
from tests import tiny


class Recorder:
    """A backend that keeps what it is given, by step, over all the processes that opened it."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.times: dict[int, float | None] = {}
        self.calls: list[str] = []
        self.starts: list[BackendStart] = []
        self.fault: Callable[[], None] | None = None
        self.description = "in memory"
        self.kept_step = 0
        self.can_cut = True  # what it has of later steps, as TensorBoard does

    def open(self, start: BackendStart) -> "Recorder":
        self.starts.append(start)
        self.kept_step = start.last_step if self.can_cut else max(self.steps, default=0)
        self.steps = {step: values for step, values in self.steps.items() if step <= self.kept_step}
        self._answer("open")
        return self

    def _answer(self, name: str) -> None:
        self.calls.append(name)
        if self.fault:
            self.fault()

    def log(self, step: int, numbers: Mapping[str, float], time_s: float | None) -> None:
        self._answer("log")
        self.times[step] = time_s
        self.steps.setdefault(step, {}).update(numbers)

    def log_histograms(self, step: int, layers: Any) -> None:
        self._answer("histograms")

    def log_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        self._answer(f"samples {samples}")

    def flush(self) -> None:
        self._answer("flush")

    def close(self, exit_code: int) -> None:
        self._answer(f"close {exit_code}")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    backend = Recorder()
    monkeypatch.setitem(guarded_sink.BACKENDS, "tensorboard", backend.open)
    return backend


def opened(folder: Path, *, to: str = "[tensorboard]", first_step: int = 0, **derived: Any) -> Tracker:
    settings = tiny.load(folder, f"track.to={to}")
    settings.run_folder.mkdir(parents=True, exist_ok=True)
    return Tracker(settings, tiny.run_folder(settings.run_folder), 0, first_step, 12, derived=derived)


def trained(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log_metrics(step, {"train/lr": step / 10, "data/ledger": "text"})


def plan(first: int, last: int) -> dict[int, dict[str, float]]:
    return {step: {"train/lr": step / 10} for step in range(first, last + 1)}


def test_a_backend_is_given_the_numbers_the_samples_and_the_facts(
    tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = opened(tmp_path, parameters=7)
    trained(tracker, 1, 2)
    tracker.log_samples(2, [("a", "b")])
    trained(tracker, 3, 3)
    tracker.log_samples(3, [("c", "d")])
    tracker.close(0)
    assert recorder.steps == plan(1, 3)
    assert [call for call in recorder.calls if call[:7] == "samples"] == [
        "samples [('a', 'b')]",
        "samples [('c', 'd')]",
    ]
    assert recorder.calls[-1] == "close 0"
    (start,) = recorder.starts
    assert start.facts["derived"] == {"parameters": 7}
    assert start.facts["model"]["hidden_size"] == 32
    said = capsys.readouterr().out.splitlines()[:2]
    assert said == ["W&B                    off, track.to leaves it out", "tensorboard            in memory"]


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_fault_is_said_once_costs_no_step_and_is_made_up_for_at_the_next_start(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    monkeypatch.setattr(guarded_sink, "CALL_TIMEOUT_S", 0.1)

    def fail() -> None:
        if fault == "hangs":
            time.sleep(60)
        raise OSError("disk full\nand more")

    tracker = opened(tmp_path)
    trained(tracker, 1, 2)
    recorder.fault = fail
    trained(tracker, 3, 6)
    tracker.log_samples(6, [("a", "b")])
    tracker.close(0)
    assert recorder.calls.count("log") == 3, "nothing is asked of it after the first fault"
    why = {"raises": "disk full", "hangs": "no answer within 0.1 s"}[fault]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    rest = "training goes on, the next start gives it what it lacks, from metrics.jsonl"
    assert warnings == [f"WARNING: tensorboard is dropped at step 3 ({why}); {rest}"]
    lines = (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    recorder.fault = None
    tracker = opened(tmp_path, first_step=6)
    trained(tracker, 7, 7)
    tracker.close(0)
    assert recorder.steps == plan(1, 7)


def test_one_that_cannot_be_opened_is_off(
    tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise PermissionError("not here")

    recorder.fault = fail
    tracker = opened(tmp_path)
    trained(tracker, 1, 1)
    tracker.close(0)
    assert capsys.readouterr().out.splitlines()[1] == "tensorboard            off, it cannot be opened (not here)"
    assert recorder.calls == ["open"]


def test_after_a_kill_later_steps_are_cut_off_and_each_step_is_there_once(
    tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "quickstart"
    tracker = opened(tmp_path)
    trained(tracker, 1, 4)
    tracker.log_model(4, run / "weights", ends_phase=False)  # a checkpoint was published
    trained(tracker, 5, 6)
    told = (run / SINKS_FILE).read_text(encoding="utf-8")
    assert json.loads(told) == {"tensorboard": 4}
    assert recorder.calls[-3:] == ["flush", "log", "log"]
    tracker.close(1)
    (run / SINKS_FILE).write_text(told, encoding="utf-8")  # as after a kill, which closes nothing
    capsys.readouterr()
    tracker = opened(tmp_path, first_step=3)  # that checkpoint was damaged: the one before
    assert (recorder.starts[-1].last_step, recorder.steps) == (3, plan(1, 3))
    assert "come from metrics.jsonl" not in capsys.readouterr().out
    trained(tracker, 4, 8)
    tracker.close(0)
    assert recorder.steps == plan(1, 8)


def test_what_cannot_be_cut_off_is_not_given_twice(tmp_path: Path, recorder: Recorder) -> None:
    recorder.can_cut = False
    for first_step, last in ((0, 6), (3, 5), (3, 8)):  # two kills
        tracker = opened(tmp_path, first_step=first_step)
        num_before = recorder.calls.count("log")
        trained(tracker, first_step + 1, last)
        tracker.close(0)
        assert recorder.calls.count("log") - num_before == {6: 6, 5: 0, 8: 2}[last]
    assert recorder.steps == plan(1, 8)


def test_one_that_was_not_asked_for_before_is_given_the_past(
    tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = opened(tmp_path, to="[]")
    trained(tracker, 1, 5)
    tracker.close(0)
    assert recorder.calls == []
    tracker = opened(tmp_path, first_step=5)
    trained(tracker, 6, 6)
    tracker.close(0)
    assert recorder.steps == plan(1, 6)
    assert "tensorboard            in memory; steps 1 to 5 come from metrics.jsonl" in capsys.readouterr().out
    lines = (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    trained_at = {line["step"]: line["time_s"] for line in map(json.loads, lines)}
    assert recorder.times == trained_at | {6: None}


def test_a_sink_whose_package_is_missing_is_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = tiny.load(tmp_path, "track.to=[wandb]")
    asking = tiny.load(tmp_path, "track.to=[wandb,tensorboard]")
    monkeypatch.setattr(guarded_sink.importlib.util, "find_spec", lambda _: None)
    check_sinks(without)
    with pytest.raises(UserError, match=r"tensorboard is not installed.*\[tensorboard\]"):
        check_sinks(asking)
