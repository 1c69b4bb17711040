"""What a program that trains through the library does after each step: its callbacks, and the metrics that they give.

A callback is called by the training loop at one place, when the step's own numbers are written down, and before the
step's evaluation, samples and checkpoint. It decides nothing: what is due does not depend on callbacks or their order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smoltrain.errors import Problem, UserError, format_value
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
            custom |= _read_metrics(callback(step, dict(metrics)))
        except Exception as error:
            raise CallbackFailed(f"a callback failed after step {step}") from error
    return custom


def _read_metrics(returned: Any) -> dict[str, float]:
    """The numbers that a callback returned, as they are logged. Errors: UserError for anything else."""
    if returned is None or returned is False:  # the latter of `step % 10 == 0 and print(step)`
        return {}
    want = "numbers by name, in a dict, or None"
    if not isinstance(returned, Mapping):
        raise UserError(Problem("a callback returned no metrics", format_value(returned), want, "callbacks"))
    custom: dict[str, float] = {}
    for name, value in returned.items():
        try:
            custom[CUSTOM_PREFIX + str(name).removeprefix(CUSTOM_PREFIX)] = float(value)
        except (TypeError, ValueError, RuntimeError):  # the last is torch's, for a tensor of several numbers
            saw = f"{name}: {format_value(value)}"
            raise UserError(Problem("a callback returned no number", saw, want, "callbacks")) from None
    return custom
