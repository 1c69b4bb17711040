"""What a program that trains through the library does after each step: its callbacks, and the metrics that they give.

A callback is called by the training loop at one place, when the step's own numbers are written down, and before the
step's evaluation, samples and checkpoint. It decides nothing: what is due does not depend on callbacks or their order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smoltrain.run.track import CUSTOM_PREFIX

# (step, the step's metrics by name) -> metrics of one's own by name, or nothing.
StepCallback = Callable[[int, dict[str, Any]], Mapping[str, Any] | None]


class CallbackFailed(Exception):
    """A callback has raised, or has returned what is no metric; the error is the cause of this one."""


def run_callbacks(callbacks: Sequence[StepCallback], step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Call each with the step and a copy of its metrics; what they return, as floats named `custom/...`.

    Errors: CallbackFailed for the first that raises, or that returns anything but numbers by name.
    """
    custom: dict[str, float] = {}
    for callback in callbacks:
        try:
            for name, value in (callback(step, dict(metrics)) or {}).items():
                custom[CUSTOM_PREFIX + str(name).removeprefix(CUSTOM_PREFIX)] = float(value)
        except Exception as error:
            raise CallbackFailed(f"a callback failed after step {step}") from error
    return custom
