"""A run's curves and plan as PNG files. matplotlib's object interface throughout: no window, no global state.

matplotlib is imported when something is drawn: training, which draws at its end, would begin half a second later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smoltrain.files import name_file, report_unwritable
from smoltrain.run.axis_ticks import format_ticks, pick_linear_ticks, pick_log_ticks
from smoltrain.run.run_metrics import RunMetrics, read_run_metrics
from smoltrain.run.run_title import describe_run_title
from smoltrain.run.step_axis import WIDE, AxisTick, StepAxis
from smoltrain.run.thin_series import smooth_series, thin_series
from smoltrain.schedule import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "#2a6fb0"
ORANGE = "#d1661f"
GREY = "#5f6b76"
GREEN = "#3c7d4f"
CURVE_COLORS = (BLUE, ORANGE, GREEN, "#8a4f9e", "#b3323c", "#2f8f8f", "#8a6d1f", GREY)  # of a grid, in turn
PHASE_COLORS = ("#e6eef7", "#fbeed6", "#e4f2e3", "#f3e6f2")  # one per phase, in turn
MOST_STEPS = 4000  # of a phase, that a plan's picture shows
SMOOTHED = 200  # values, from which on a running median is drawn too
UNEVEN = "short phases are drawn wider"


def draw_plan(plan: Plan, path: Path, title: str = "") -> None:
    """Draw learning rate and weight decay over the steps, each phase shaded and named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), dpi=140, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axis = StepAxis(plan, 1, plan.last_step)
    steps = steps_to_plot(plan)
    edges = axis.place(np.array([step - 0.5 for step in (*steps, plan.last_step + 1)]))
    for axes, values, color, label in (
        (upper, [plan.lr(step) for step in steps], BLUE, "learning rate"),
        (lower, [plan.weight_decay(step) for step in steps], GREY, "weight decay"),
    ):
        _shade_phases(axes, axis)
        axes.stairs(values, edges, baseline=None, color=color, linewidth=2)
        axes.set(ylim=(0, 1.1 * max(values) or 1), ylabel=label)
        _set_ticks(axes, count=5 if axes is upper else 2)
    _save_figure(figure, [upper, lower], axis, title, path)


def steps_to_plot(plan: Plan) -> list[int]:
    """Steps to show, in order: all of a phase, or about MOST_STEPS, with its ends and those of warm-up and decay."""
    steps: set[int] = set()
    for phase in plan.phases:
        inside = range(phase.first, phase.last + 1)
        warm = phase.first + phase.spec.warmup_steps  # the first step after warm-up
        stable = phase.last - phase.spec.decay_steps  # the last step before the decay
        steps.update(inside[:: max(1, len(inside) // MOST_STEPS)], (phase.first, phase.last))
        steps.update(step for step in (warm - 1, warm, stable, stable + 1) if step in inside)
    return sorted(steps)


def draw_run(plan: Plan, run: Path) -> list[Path]:
    """Draw a run's metrics.jsonl under run/plots: loss.png, and training.png with every panel; the files written.

    Errors: UserError if the run has not trained a step yet, or they cannot be written.
    """
    from matplotlib.figure import Figure

    metrics = read_run_metrics(run)
    title = describe_run_title(run, metrics)
    # Past step 1 where the run went on from another one; to its last step, as nothing is known of those after it.
    axis = StepAxis(plan, metrics.first_step or 1, metrics.last_step)
    panels_of_file = {"loss.png": PANELS[:1], "training.png": PANELS}
    if not metrics.names("data/unique_documents"):  # older versions of smoltrain did not count them
        panels_of_file["training.png"] = PANELS[:-1]
    written = []
    for name, panels in panels_of_file.items():
        figure = Figure(figsize=(9, 4.1 + 1.45 * (len(panels) - 1)), dpi=140, layout="constrained")
        heights = [3.6 if draw is _plot_loss else 1.45 for draw in panels]
        column = list(figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
        for axes, draw in zip(column, panels, strict=True):
            _shade_phases(axes, axis)
            draw(axes, PlacedCurves(metrics, axis))
        _add_token_axis(column[0], axis.ticks_of(*metrics.series("data/tokens"), character=WIDE))
        figure.align_ylabels()
        path = run / "plots" / name
        with report_unwritable("the curves", "a folder that can be written", str(path)):
            _save_figure(figure, column, axis, title, path)
        written.append(path)
    return written


@dataclass(frozen=True)
class PlacedCurves:
    """A run's numbers, and where its steps stand."""

    metrics: RunMetrics
    axis: StepAxis

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(places, values) of one name."""
        steps, values = self.metrics.series(name)
        return self.axis.place(steps), values


def _plot_noisy_series(axes: "Axes", curves: PlacedCurves, name: str, color: str, label: str | None = None) -> None:
    """One value per step: thin and faint, with a running median where there are enough to need one."""
    places, values = curves.curve(name)
    if len(places) < SMOOTHED:
        marker = "o" if len(places) == 1 else None
        axes.plot(places, values, color=color, linewidth=1.2, marker=marker, markersize=4, label=label)
        return
    axes.plot(*thin_series(places, values, 1500), color=color, linewidth=0.5, alpha=0.3)
    label = f"{label}, median of {len(places) // 50} steps" if label else None
    axes.plot(*smooth_series(places, values), color=color, linewidth=1.6, label=label)


def _plot_loss(axes: "Axes", curves: PlacedCurves) -> None:
    _plot_noisy_series(axes, curves, "train/loss_nats_per_token", BLUE, "training loss")
    validation = curves.curve("validation/loss_nats_per_token")
    if np.isfinite(validation[1]).any():
        axes.plot(*validation, "o-", color=ORANGE, markersize=4, label="validation loss", clip_on=False)
    axes.set_ylabel("loss, nats per token")
    _set_log_ticks(axes, curves, "train/loss_nats_per_token", "validation/loss_nats_per_token")


def _plot_lr(axes: "Axes", curves: PlacedCurves) -> None:
    axes.plot(*curves.curve("train/lr"), color=GREY, linewidth=1.5)
    axes.margins(y=0.1)
    axes.set(ylabel="learning rate", ylim=(0, None))
    _set_ticks(axes)


def _plot_gradient_norm(axes: "Axes", curves: PlacedCurves) -> None:
    _plot_noisy_series(axes, curves, "train/grad_norm_before_clipping", GREEN)
    axes.set_ylabel("gradient norm\nbefore clipping")
    _set_log_ticks(axes, curves, "train/grad_norm_before_clipping", count=3)


def _plot_throughput(axes: "Axes", curves: PlacedCurves) -> None:
    _plot_noisy_series(axes, curves, "speed/tokens_per_s", GREY)
    axes.set(ylabel="tokens/s,\nall ranks", ylim=(0, None))
    _set_ticks(axes)


def _plot_unique_rows(axes: "Axes", curves: PlacedCurves) -> None:
    axes.plot(*curves.curve("data/unique_rows"), color=GREEN, linewidth=1.5)
    axes.set(ylabel="unique rows\nseen", ylim=(0, None))
    _set_ticks(axes)


def _plot_unique_documents(axes: "Axes", curves: PlacedCurves) -> None:
    """And the repeat factor on a scale of its own, to the right."""
    axes.plot(*curves.curve("data/unique_documents"), color=GREEN, linewidth=1.5)
    axes.set(ylabel="unique\ndocuments", ylim=(0, None))
    _set_ticks(axes)
    right = axes.twinx()
    right.plot(*curves.curve("data/repeat_factor"), color=ORANGE, linewidth=1.5, linestyle=(0, (4, 2)))
    right.set_ylabel("repeat factor", color=ORANGE)
    right.set_ylim(0, max(2, right.get_ylim()[1]))
    _set_ticks(right)
    right.tick_params(axis="y", colors=ORANGE)
    right.spines[["top", "left"]].set_visible(False)


PANELS = (_plot_loss, _plot_lr, _plot_gradient_norm, _plot_throughput, _plot_unique_rows, _plot_unique_documents)


def _set_ticks(axes: "Axes", count: int = 3) -> None:
    """Round numbers on a linear axis, each of them once."""
    ticks = pick_linear_ticks(*axes.get_ylim(), count)
    axes.set_yticks(ticks, format_ticks(ticks))


def _set_log_ticks(axes: "Axes", curves: PlacedCurves, *names: str, count: int = 5) -> None:
    """A logarithmic axis with numbers that can be read, where a value of these names is above 0."""
    values = np.concatenate([curves.curve(name)[1] for name in names])
    if not (values[np.isfinite(values)] > 0).any():
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value above 0", ha="center", va="center", transform=axes.transAxes)
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = pick_log_ticks(low, high, count)
    axes.set_yticks([], minor=True)
    axes.set_yticks(ticks, format_ticks(ticks))
    axes.set_ylim(low, high)


def _shade_phases(axes: "Axes", axis: StepAxis) -> None:
    for i, stretch in enumerate(axis.stretches):
        name = f"{stretch.name}: {stretch.first:,} to {stretch.last:,}"
        color = PHASE_COLORS[i % len(PHASE_COLORS)]
        axes.axvspan(stretch.left, stretch.right, color=color, linewidth=0, label=name)
        if i > 0:
            axes.axvline(stretch.left, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)


def _add_token_axis(axes: "Axes", ticks: Sequence[AxisTick]) -> None:
    """Tokens above the steps, where they were counted."""
    if ticks:
        above = axes.secondary_xaxis("top")
        above.set_xticks([tick.place for tick in ticks], [tick.label for tick in ticks])
        above.set_xlabel("tokens")


def _save_figure(figure: "Figure", column: Sequence["Axes"], axis: StepAxis, title: str, path: Path) -> None:
    """Write a column of axes that share their steps, with title and legend."""
    ticks = axis.ticks(8, WIDE)
    column[-1].set_xticks([tick.place for tick in ticks], [tick.label for tick in ticks])
    column[-1].set_xlabel("step" if axis.is_even else f"step ({UNEVEN})")
    if title:
        figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=11)
    figure.legend(*column[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_file(path):
        figure.savefig(path)


@dataclass(frozen=True)
class GridCurve:
    """The losses of runs that differ in one value alone."""

    label: str  # what else they share; empty where there is nothing
    means: list[tuple[float, float]]  # (value, mean loss over the seeds)
    points: list[tuple[float, float]]  # (value, loss) of every run
    diverged: list[float]  # values at which a run diverged


def draw_grid(curves: list[GridCurve], x_label: str, ticks: dict[float, str], title: str, path: Path) -> None:
    """Draw validation losses against a value of the runs: a line for each curve, a dot for each run.

    `ticks` are the values that were tried and how they were typed; the axis is logarithmic if all are above 0. Values
    at which a run diverged have a cross at the upper edge.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(7, 4.4), dpi=140, layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        color = CURVE_COLORS[number % len(CURVE_COLORS)]
        axes.plot(*np.reshape(curve.means, (-1, 2)).T, color=color, linewidth=1.8, label=curve.label)
        axes.plot(*np.reshape(curve.points, (-1, 2)).T, "o", color=color, markersize=4)
        crosses = [0.97 - 0.04 * (number % 4)] * len(curve.diverged)
        axes.plot(
            curve.diverged, crosses, "x", color=color, markersize=8, transform=axes.get_xaxis_transform(), clip_on=False
        )
    if min(ticks) > 0:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([ticks[value] for value in sorted(ticks)])
    axes.set(xlabel=x_label, ylabel="validation loss, nats per token", title=title)
    if any(curve.diverged for curve in curves):
        axes.plot([], [], "x", color=GREY, markersize=8, label="diverged")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e6e9")
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        axes.legend(handles, labels, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_file(path):
        figure.savefig(path)
