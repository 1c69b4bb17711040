"""Validation losses over a run, and what is read off them: when a loss is reached, which rate is the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.timing import MIN_CLEAN_CALLS, CallTimes, summarise_times
from benchmarks.watching import Evaluation, TrainerRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WARM_UP = 3  # steps that compile, allocate and fill caches
MIN_STEPS = WARM_UP + MIN_CLEAN_CALLS
COLORS = ("#2a6fb0", "#d1661f", "#3c7d4f", "#8a4fa3", "#5f6b76", "#b3462f", "#7a6a1f")


@dataclass(frozen=True)
class Entry:
    """One trainer in the comparison, at every rate that was tried; losses and records by rate."""

    name: str
    steps: int  # of its whole plan
    runs: dict[float, TrainerRecord]
    timed: list[TrainerRecord]  # more runs at the best rate, for the seconds alone; may be none

    @property
    def best_rate(self) -> float:
        """The rate with the lowest loss at the end of the plan."""
        return choose_best_rate({rate: run.evaluations[-1].loss for rate, run in self.runs.items()})

    @property
    def best(self) -> TrainerRecord:
        """The run at that rate."""
        return self.runs[self.best_rate]

    @property
    def final_loss(self) -> float:
        """Of the run at the best rate."""
        return self.best.evaluations[-1].loss

    @property
    def step_times(self) -> CallTimes:
        """The median over the clean steps, without each run's warm-up."""
        runs = self.timed or [self.best]
        seconds = [took for run in runs for took in run.step_s[WARM_UP:]]
        waits = [waited for run in runs for waited in run.waits_s[WARM_UP:]]
        return summarise_times(seconds, waits)


@dataclass(frozen=True)
class Reached:
    """What it took an entry to reach a loss, at its best rate."""

    steps: float
    tokens: float
    seconds: float  # steps x the median clean step
    raw_s: float  # the sum of those very steps, the first one, which has the start in it, as long as the median
    wall_s: float  # from the command to the evaluation that saw the loss, with the start and the evaluations before


def find_steps_until(evaluations: Sequence[Evaluation], loss: float, *, interpolate: bool) -> float | None:
    """The step at which a loss was reached: of the first evaluation at or below it; None if there is none.

    Interpolated, it is where the straight line from the evaluation before meets the loss.
    """
    before: Evaluation | None = None
    for found in evaluations:
        if found.loss <= loss:
            if interpolate and before is not None and found.loss < before.loss:
                share = (before.loss - loss) / (before.loss - found.loss)
                return before.step + share * (found.step - before.step)
            return found.step
        before = found
    return None


def choose_best_rate(final_losses: Mapping[float, float]) -> float:
    """The rate whose loss is the lowest; the lower rate of two that are equal. A loss that is no number is the last."""
    order = sorted(final_losses, key=lambda rate: (not math.isfinite(final_losses[rate]), final_losses[rate], rate))
    return order[0]


def describe_edge(best: float, rates: Sequence[float]) -> str | None:
    """What is to be said of the best rate if it may not be the best there is."""
    if len(rates) < 3:
        return f"only {len(rates)} rate{'s' if len(rates) > 1 else ''} tried"
    if best == max(rates):
        return f"the best rate, {best:g}, is the highest that was tried"
    if best == min(rates):
        return f"the best rate, {best:g}, is the lowest that was tried"
    return None


def measure_reached(entry: Entry, loss: float, tokens_per_step: int, *, interpolate: bool) -> Reached | None:
    """What it took; None if the run at the best rate did not get there."""
    steps = find_steps_until(entry.best.evaluations, loss, interpolate=interpolate)
    if steps is None:
        return None
    step_s = entry.step_times.median_s
    runs = entry.timed or [entry.best]
    last = math.ceil(steps)
    raw_s = [step_s + sum(run.step_s[1:last]) for run in runs]
    wall_s = [next(found.at_s for found in run.evaluations if found.step >= steps) for run in runs]
    return Reached(steps, steps * tokens_per_step, steps * step_s, median(raw_s), median(wall_s))


def draw_curves(entries: Sequence[Entry], loss: float, path: Path) -> None:
    """Validation loss against steps and against seconds: the best rate of each trainer, the others faint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=140, layout="constrained")
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    for number, entry in enumerate(entries):
        color = COLORS[number % len(COLORS)]
        for rate, run in entry.runs.items():
            is_best = rate == entry.best_rate
            _plot_run(by_steps, run, 1.0, color, f"{entry.name}, {rate:g}" if is_best else None)
            if is_best:
                _plot_run(by_seconds, run, entry.step_times.median_s, color, entry.name)
    for axes, label in ((by_steps, "step"), (by_seconds, "seconds of steps (steps x the median clean step)")):
        axes.axhline(loss, color="#5f6b76", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    by_steps.set(ylabel="validation loss, nats per token")
    figure.legend(*by_steps.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plot_run(axes: "Axes", run: TrainerRecord, unit: float, color: str, label: str | None) -> None:
    steps = [found.step * unit for found in run.evaluations]
    losses = [found.loss for found in run.evaluations]
    if label:
        axes.plot(steps, losses, "o-", color=color, markersize=3, linewidth=1.6, label=label)
    else:
        axes.plot(steps, losses, color=color, linewidth=0.8, alpha=0.35)
