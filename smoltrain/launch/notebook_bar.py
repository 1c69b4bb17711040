"""A progress bar below the cell of a notebook: how far the plan is, the loss, the time left."""

import statistics
import sys
import time
from collections import deque
from typing import Any

REFRESH_S = 0.25  # between two drawings
RECENT_STEPS = 50  # whose median duration says what the rest takes


def is_notebook() -> bool:
    """Whether this program is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class NotebookBar:
    """A callback (training/callbacks.py) that draws how far training is. The front end shows HTML, others text."""

    def __init__(self, first_step: int, last_step: int) -> None:
        """Steps up to `first_step` are done already."""
        from IPython.display import display

        self._last_step = last_step
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._drawn_at = self._step_ended_at = time.monotonic()
        self._step = first_step
        self._text = "starting"
        self._handle: Any = display(self, display_id=True)

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """Draw the bar after a step, now and then."""
        now = time.monotonic()
        self._durations.append(now - self._step_ended_at)  # with what was done after the step before
        self._step_ended_at = now
        self._step = step
        left_s = round(statistics.median(self._durations) * (self._last_step - step))
        loss = metrics["train/loss_nats_per_token"]
        speed = metrics["speed/tokens_per_s"]
        self._text = f"loss {loss:.4f}, {speed:,.0f} tokens/s, {left_s // 60}:{left_s % 60:02d} left"
        if step == self._last_step or now - self._drawn_at >= REFRESH_S:
            self._drawn_at = now
            self._handle.update(self)

    def __repr__(self) -> str:
        return f"step {self._step} of {self._last_step}: {self._text}"

    def _repr_html_(self) -> str:
        return f'<progress value="{self._step}" max="{self._last_step}"></progress> {self!r}'
