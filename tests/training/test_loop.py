"""What is due after a step, and how a run leaves its loop."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from smoltrain.config.load import load_config
from smoltrain.errors import DONE, STOPPED
from smoltrain.schedule import Plan
from smoltrain.training import after_step, loop
from smoltrain.training.step_result import StepResult
from tests import tiny

AFTER_STEP = (
    "record", "call_callbacks", "record_rows", "validate", "evaluate_tasks", "sample", "save", "record_closing",
)  # fmt: skip


class Story:
    """Stands in for a Session of the tiny plan (8 and 4 steps), and for after_step: what is asked is a word."""

    def __init__(self, tmp_path: Any, *overrides: str, done: int = 0, reason: str | None = None) -> None:
        self.config = load_config("quickstart", [*tiny.words(tmp_path, *overrides)])
        self.plan = Plan(self.config.phases)
        self.start = SimpleNamespace(
            point=SimpleNamespace(step=done), last_step=self.plan.last_step, validation_missing=False
        )
        self.words: list[str] = []
        self.unsettled: list[int] = []  # steps that are read late where that is possible
        self.callbacks: list[Any] = []
        self.said: list[str] = []
        self.validates = True
        self.stop = SimpleNamespace(reason=reason, listen=lambda: self.note("listen"), is_raised=lambda: bool(reason))
        self.world = SimpleNamespace(gather=lambda value: [None, value], is_first=False)
        self.watchdog = SimpleNamespace(mark=lambda _: None)
        self.saver = SimpleNamespace(poll=lambda: None, finish=lambda: self.note("published"))
        self.endings: list[tuple[str, str]] = []
        self.tracker = SimpleNamespace(
            say=self.said.append, show_activity=lambda _: contextlib.nullcontext(),
            record_ending=lambda kind, reason: self.endings.append((kind, reason)),
        )  # fmt: skip
        self.folder = SimpleNamespace(path=tmp_path)

    def note(self, word: str) -> None:
        self.words.append(word)

    def record(self, step: int, result: StepResult) -> None:
        self.note("record")

    def call_callbacks(self, step: int, result: StepResult) -> None:
        self.note("callbacks")

    def record_rows(self, result: StepResult) -> None:
        self.note(f"rows {len(result.digests)}")

    def validate(self, step: int) -> bool:
        self.note("validate")
        return self.validates

    def evaluate_tasks(self, step: int) -> None:
        self.note("tasks")

    def sample(self, step: int) -> None:
        self.note("sample")

    def save(self, step: int) -> None:
        self.note(f"save {step}")

    def record_closing(self, step: int, closing_s: float) -> None:
        assert closing_s >= 0
        self.note(f"closing of {step}")


def with_a_callback(story: Story) -> Story:
    story.callbacks = [print]
    return story


def run(story: Any, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None, waited: bool = False) -> int:
    """The loop, in which a step does nothing but stop where it is told to."""

    def train_steps(steps: range, session: Any, is_awaited: Any) -> Iterator[tuple[int, StepResult]]:
        for step in steps:
            story.note(f"step {step}")
            if step == stop_at:
                yield step, StepResult(np.zeros(3, np.uint64), stopped=True, waited_for_data=waited)
                return
            yield step, StepResult(np.zeros(8, np.uint64))
            looked_at = {"validate", "sample", f"save {step}"} & set(after(story, step))
            assert is_awaited(step) or not looked_at, "its state may not be settled"
            if not is_awaited(step):
                story.unsettled.append(step)

    monkeypatch.setattr(loop, "train_steps", train_steps)
    for name in AFTER_STEP:
        monkeypatch.setattr(after_step, name, lambda session, *given, name=name: getattr(session, name)(*given))
    return loop.run_loop(story)


def after(story: Story, step: int) -> list[str]:
    """What was asked for from the beginning of this step to that of the next one."""
    first = story.words.index(f"step {step}") + 1
    following = story.words[first:]
    return following[: following.index(f"step {step + 1}")] if f"step {step + 1}" in following else following


def test_each_thing_is_done_when_it_is_due_and_at_the_end_of_a_phase(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path)  # evaluate every 4 steps, sample every 6, save every 3
    assert run(story, monkeypatch) == DONE
    assert story.words[:2] == ["listen", "step 1"], "a signal ends the process until the loop begins"
    step = ["rows 8", "record", "callbacks"]
    assert [after(story, n) for n in (1, 3, 4, 6)] == [
        step, [*step, "save 3"], [*step, "validate"], [*step, "sample", "save 6"],
    ]  # fmt: skip
    assert after(story, 8) == [*step, "validate", "sample", "save 8"], "the end of a phase"
    assert after(story, 12) == [*step, "validate", "sample", "save 12", "published", "closing of 12"]
    assert story.unsettled == [1, 2, 5, 7, 10, 11]
    assert all(after_step.is_anything_due(cast(Any, with_a_callback(story)), step) for step in story.unsettled)
    assert "the plan is complete (12 steps)" in story.said[-1]
    assert story.endings == [("done", "the plan is complete (12 steps)")]


@pytest.mark.parametrize(("waited", "more"), [(False, ""), (True, ", waiting for data")])
def test_a_stop_saves_the_step_before_and_leaves_at_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, waited: bool, more: str
) -> None:
    story = Story(tmp_path, reason="SIGTERM")
    assert run(story, monkeypatch, stop_at=6, waited=waited) == STOPPED
    assert after(story, 6) == ["rows 3", "save 5", "published", "closing of 5"], (
        "rows that it has consumed are in the ledger first"
    )
    assert story.said == [f"stopped after step 5 (SIGTERM){more}; the same command goes on from there"]
    assert story.endings == [("stopped", f"after step 5 (SIGTERM){more}")]


def test_curves_that_cannot_be_written_end_no_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path)
    story.world.is_first = True
    (tmp_path / "metrics.jsonl").write_text('{"step": 12, "train/loss_nats_per_token": 1.0}\n')
    (tmp_path / "plots").write_text("a file in the place of the folder")
    assert run(story, monkeypatch) == DONE
    assert story.said[-2].startswith("WARNING: the curves cannot be written: saw File exists: ")
    assert story.said[-1] == "quickstart: the plan is complete (12 steps)", "which names no curves"


def test_a_stop_before_the_first_step_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path, reason="SIGINT")
    assert run(story, monkeypatch, stop_at=1) == STOPPED
    assert story.said == ["stopped before the first step (SIGINT); the same command goes on from there"]


def test_a_stop_that_came_with_the_last_step_counts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path, reason="its launcher is gone")
    assert run(story, monkeypatch) == STOPPED
    assert story.said == ["stopped after step 12 (its launcher is gone); the same command goes on from there"]


def test_a_missing_validation_is_made_up_for_before_the_first_step(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path, done=8)
    story.start.validation_missing = True
    assert run(story, monkeypatch) == DONE
    assert story.words[:3] == ["listen", "validate", "step 9"]
    story = Story(tmp_path, done=8, reason="SIGTERM")
    story.start.validation_missing = True
    story.validates = False
    assert run(story, monkeypatch) == STOPPED
    assert story.words == ["listen", "validate", "published", "closing of 8"]
