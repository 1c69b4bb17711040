"""The numbers of a metrics.jsonl as columns, by name: 16 bytes for each number, so that 100,000 steps fit in memory."""

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain.errors import Problem, UserError
from smoltrain.files import METRICS_FILE, read_jsonl


class RunMetrics:
    """Steps and values of each name that is logged, in the order of the lines."""

    def __init__(self) -> None:
        self.first_step: int | None = None  # None as long as there is no line
        self.last_step = 0
        self.last_texts: dict[str, str] = {}  # the last value of names whose values are text
        self._columns: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in one line."""
        step = line["step"]
        if self.first_step is None:
            self.first_step = step
        self.last_step = max(self.last_step, step)
        for name, value in line.items():
            if isinstance(value, str):
                self.last_texts[name] = value
            elif type(value) in (int, float) and name != "step":
                steps, values = self._columns.get(name) or self._open_column(name)
                steps.append(step)
                values.append(value)

    def _open_column(self, name: str) -> tuple["array[int]", "array[float]"]:
        self._columns[name] = (array("q"), array("d"))
        return self._columns[name]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one name; two empty arrays where it was never logged."""
        steps, values = self._columns.get(name, ((), ()))
        return np.array(steps, np.int64), np.array(values, np.float64)

    def last(self, name: str) -> float | None:
        """The last value of a name; None where it was never logged."""
        _, values = self._columns.get(name, ((), ()))
        return values[-1] if values else None

    def names(self, prefix: str = "") -> list[str]:
        """The names of numbers that begin so, in the order in which they came."""
        return [name for name in self._columns if name.startswith(prefix)]


def read_run_metrics(run: Path) -> RunMetrics:
    """Errors: UserError if the run has not trained a step yet."""
    metrics = RunMetrics()
    for line in read_jsonl(run / METRICS_FILE):
        metrics.add(line)
    if metrics.first_step is None:
        raise no_step_error(run)
    return metrics


def no_step_error(run: Path) -> UserError:
    """What a run without a step is refused with."""
    saw = f"no step in {run / METRICS_FILE}"
    return UserError(Problem("there is nothing to draw yet", saw, "a run that trained", "RUN"))
