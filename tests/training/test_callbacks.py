"""What callbacks are given, what they may return, and what becomes of their mistakes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from smoltrain.errors import UserError
from smoltrain.training import after_step
from smoltrain.training.callbacks import CallbackFailed, run_callbacks
from smoltrain.training.step_result import StepResult


def test_metrics_of_ones_own_are_floats_under_custom() -> None:
    seen: list[Any] = []

    def look(step: int, metrics: dict[str, Any]) -> None:
        seen.append((step, dict(metrics)))
        metrics.clear()  # of its own copy

    def give(step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        return {
            "double": 2 * metrics["loss"],
            "custom/tensor": torch.tensor(3.0),
            "numpy": np.float32(0.5),
            "int": step,
        }

    custom = run_callbacks([look, give], 7, {"loss": 1.5})
    assert seen == [(7, {"loss": 1.5})]
    assert custom == {"custom/double": 3.0, "custom/tensor": 3.0, "custom/numpy": 0.5, "custom/int": 7.0}
    assert {type(value) for value in custom.values()} == {float}


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"a": "text"}, "a callback returned no number: saw a: 'text', want numbers by name"),
        ({"a": None}, "a callback returned no number: saw a: None"),
        ({"a": torch.zeros(2)}, "a callback returned no number: saw a: tensor"),
        (3.0, "a callback returned no metrics: saw 3.0, want numbers by name, in a dict, or None"),
    ],
)
def test_what_is_no_metric_fails_as_an_error_of_its_own_does(returned: Any, said: str) -> None:
    with pytest.raises(CallbackFailed) as caught:
        run_callbacks([lambda step, metrics: returned], 1, {})
    assert isinstance(caught.value.__cause__, UserError)
    assert str(caught.value.__cause__).startswith(said)
    short: Any = lambda step, metrics: step > 1 and print(step)  # noqa: E731
    assert run_callbacks([short], 1, {}) == {}


def test_after_a_failure_the_step_is_saved_before_the_error_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []

    def fail(step: int, metrics: dict[str, Any]) -> None:
        raise OSError("of the program")

    monkeypatch.setattr(after_step, "save", lambda session, step: words.append(f"save {step}"))
    session: Any = SimpleNamespace(
        callbacks=[fail],
        saver=SimpleNamespace(finish=lambda: words.append("published")),
        tracker=SimpleNamespace(log_metrics=lambda *_: words.append("logged")),
    )  # fmt: skip
    result = StepResult(np.zeros(0, np.uint64), metrics={"loss": 1.0})
    with pytest.raises(CallbackFailed) as caught:
        after_step.call_callbacks(session, 3, result)
    assert str(caught.value.__cause__) == "of the program"
    assert words == ["save 3", "published"]
    session.callbacks = [lambda step, metrics: {"x": 1}]
    after_step.call_callbacks(session, 4, result)
    session.callbacks = []
    after_step.call_callbacks(session, 5, result)
    assert words == ["save 3", "published", "logged"], "where there is nothing, nothing is logged"
