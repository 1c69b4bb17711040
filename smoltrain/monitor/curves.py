"""The losses of a run over steps, tokens and hours, to be laid beside those of other runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain.files import METRICS_FILE, read_jsonl
from smoltrain.monitor.run_status import TRAINING_LOSS, VALIDATION_LOSS
from smoltrain.run.summary import PARTS, order_by_time
from smoltrain.run.time_left import START_S
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE

TOKENS = "data/tokens"
DRAWN = {"step", "time_s", TOKENS, TRAINING_LOSS, VALIDATION_LOSS, *PARTS.values()}
MAX_POINTS = 200  # of a curve in a picture; more are averaged, so that curves of several runs are told apart


@dataclass(frozen=True)
class LossCurve:
    """Losses, nats per token, at each of some steps; NaN where tokens or hours are not written down."""

    steps: np.ndarray  # (n,) int64
    tokens: np.ndarray  # (n,) float64, targets up to the step, all ranks
    hours: np.ndarray  # (n,) float64, of all starts up to the line: steps that were done again too, no night between
    losses: np.ndarray  # (n,) float64

    def axis(self, name: str) -> np.ndarray:
        """steps, tokens or hours."""
        return {"steps": self.steps, "tokens": self.tokens, "hours": self.hours}[name]

    def loss_at(self, step: int) -> float | None:
        """The loss at a step; None where there is none."""
        found = np.flatnonzero(self.steps == step)
        return float(self.losses[found[-1]]) if len(found) else None


@dataclass(frozen=True)
class RunCurves:
    """Both losses of a run."""

    training: LossCurve
    validation: LossCurve


class _Clock:
    """Hours of work up to each line: from the beginning of each start to its last line, all starts together."""

    def __init__(self) -> None:
        self._before_s = 0.0  # of the starts before
        self._began_at = 0.0
        self._newest_at = 0.0

    def hours_after(self, line: Mapping[str, Any]) -> float:
        if START_S in line:
            self._before_s += self._newest_at - self._began_at
            self._began_at = line["time_s"] - sum(line[name] for name in PARTS.values() if name in line)
        elif not self._began_at:  # of a version that did not write down its starts
            self._began_at = line["time_s"]
        self._newest_at = line["time_s"]
        return (self._before_s + line["time_s"] - self._began_at) / 3600


def read_run_curves(folder: Path) -> RunCurves:
    """The losses in a run's metrics.jsonl. Errors: UserError for records that cannot be read at all.

    The clock runs through the steps that were done again, too (metrics.undone.jsonl), as run/summary.py has it.
    """
    rows: dict[str, list[tuple[float, float, float, float]]] = {TRAINING_LOSS: [], VALIDATION_LOSS: []}
    lines = [_keep_drawn(line) for line in read_jsonl(folder / METRICS_FILE)]
    undone = [_keep_drawn(line) for line in read_jsonl(folder / UNDONE_METRICS_FILE)]
    clock = _Clock()
    hours_of_line: dict[int, float] = {}
    for line, is_undone in order_by_time(lines, undone):
        hours = clock.hours_after(line)
        if not is_undone:
            hours_of_line[id(line)] = hours
    tokens = np.nan
    for line in lines:
        tokens = line.get(TOKENS, tokens)
        for name, found in rows.items():
            if name in line:
                found.append((line["step"], tokens, hours_of_line.get(id(line), np.nan), line[name]))
    return RunCurves(_to_curve(rows[TRAINING_LOSS]), _to_curve(rows[VALIDATION_LOSS]))


def _keep_drawn(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a curve needs of a line, and the seconds by which a start's beginning is known."""
    return {name: value for name, value in line.items() if name in DRAWN}


def _to_curve(rows: list[tuple[float, float, float, float]]) -> LossCurve:
    columns = np.asarray(rows, np.float64).reshape(-1, 4)
    return LossCurve(columns[:, 0].astype(np.int64), columns[:, 1], columns[:, 2], columns[:, 3])


def average_neighbours(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about so many points: means of as many neighbours each. What is not finite is left out."""
    is_finite = np.isfinite(x) & np.isfinite(y)
    x = x[is_finite].astype(np.float64)
    y = y[is_finite]
    if len(x) <= most:
        return x, y
    starts = np.arange(0, len(x), -(-len(x) // most))
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
