"""A run's curves and plan as PNG files. matplotlib's object interface throughout: no window, no global state.

matplotlib is imported when something is drawn: training, which draws at its end, would begin half a second later.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smoltrain.errors import Problem, UserError
from smoltrain.files import METRICS_FILE, read_jsonl
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


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw learning rate and weight decay over the steps, each phase shaded and named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), dpi=140, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = steps_to_plot(plan)
    edges = [step - 0.5 for step in (*steps, plan.last_step + 1)]
    for axes, values, color, label in (
        (upper, [plan.lr(step) for step in steps], BLUE, "learning rate"),
        (lower, [plan.weight_decay(step) for step in steps], GREY, "weight decay"),
    ):
        _shade_phases(axes, plan)
        axes.stairs(values, edges, baseline=None, color=color, linewidth=2)
        axes.set(ylim=(0, 1.1 * max(values) or 1), ylabel=label)
    for axes in (upper, lower):
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    _save_figure(figure, upper, lower, path)


def steps_to_plot(plan: Plan, most: int = 4000) -> list[int]:
    """Steps to show, in order: all of a phase, or about `most`, with its ends and those of warm-up and decay."""
    steps: set[int] = set()
    for phase in plan.phases:
        inside = range(phase.first, phase.last + 1)
        warm = phase.first + phase.spec.warmup_steps  # the first step after warm-up
        stable = phase.last - phase.spec.decay_steps  # the last step before the decay
        steps.update(inside[:: max(1, len(inside) // most)], (phase.first, phase.last))
        steps.update(step for step in (warm - 1, warm, stable, stable + 1) if step in inside)
    return sorted(steps)


def draw_run(plan: Plan, run: Path) -> list[Path]:
    """Draw a run's metrics.jsonl under run/plots: loss.png, and training.png with every panel; the files written.

    Errors: UserError if the run has not trained a step yet.
    """
    from matplotlib.figure import Figure

    metrics = _read_metrics(run / METRICS_FILE)
    panels_of_file = {"loss.png": PANELS[:1], "training.png": PANELS}
    if not len(metrics.series("data/unique_documents")[0]):  # older versions of smoltrain did not count them
        panels_of_file["training.png"] = PANELS[:-1]
    written = []
    for name, panels in panels_of_file.items():
        figure = Figure(figsize=(9, 3.6 + 1.45 * (len(panels) - 1)), dpi=140, layout="constrained")
        heights = [3.6 if draw is _plot_loss else 1.45 for draw in panels]
        column = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for axes, draw in zip(column, panels, strict=True):
            _shade_phases(axes, plan)
            draw(axes, metrics)
            first_step = metrics.lines[0]["step"]  # past 1 where the run went on from another one
            axes.set_xlim(first_step - 0.5, plan.last_step + 0.5)
        figure.align_ylabels()
        _save_figure(figure, column[0], column[-1], run / "plots" / name)
        written.append(run / "plots" / name)
    return written


@dataclass(frozen=True)
class RunMetrics:
    """The lines of a metrics.jsonl."""

    lines: list[dict[str, Any]]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one name."""
        lines = [line for line in self.lines if name in line]
        steps = [line["step"] for line in lines]
        values = [line[name] for line in lines]
        return np.asarray(steps, np.int64), np.asarray(values, np.float64)


def _read_metrics(path: Path) -> RunMetrics:
    lines = list(read_jsonl(path))
    if not lines:
        raise UserError(Problem("there is nothing to draw yet", f"no step in {path}", "a run that trained", "RUN"))
    return RunMetrics(lines)


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of each value and its neighbours, `width` of them in all (fewer at the ends)."""
    half = width // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _plot_noisy_series(axes: "Axes", metrics: RunMetrics, name: str, color: str, label: str | None = None) -> None:
    """One value per step: thin and faint, with a running median where there are enough to need one."""
    steps, values = metrics.series(name)
    if len(steps) < 200:
        axes.plot(steps, values, color=color, linewidth=1.2, label=label)
        return
    width = len(steps) // 50
    axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.3)
    label = f"{label}, median of {width} steps" if label else None
    axes.plot(steps, running_median(values, width), color=color, linewidth=1.6, label=label)


def _plot_loss(axes: "Axes", metrics: RunMetrics) -> None:
    _plot_noisy_series(axes, metrics, "train/loss_nats_per_token", BLUE, "training loss")
    validation = metrics.series("validation/loss_nats_per_token")
    axes.plot(*validation, "o-", color=ORANGE, markersize=4, label="validation loss")
    axes.set(yscale="log", ylabel="loss, nats per token")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def _plot_lr(axes: "Axes", metrics: RunMetrics) -> None:
    axes.plot(*metrics.series("train/lr"), color=GREY, linewidth=1.5)
    axes.margins(y=0.1)
    axes.set(ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)


def _plot_gradient_norm(axes: "Axes", metrics: RunMetrics) -> None:
    _plot_noisy_series(axes, metrics, "train/grad_norm_before_clipping", GREEN)
    axes.set(yscale="log", ylabel="gradient norm\nbefore clipping")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _plot_throughput(axes: "Axes", metrics: RunMetrics) -> None:
    _plot_noisy_series(axes, metrics, "speed/tokens_per_s", GREY)
    axes.set(ylabel="tokens/s,\nall ranks", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _plot_unique_rows(axes: "Axes", metrics: RunMetrics) -> None:
    axes.plot(*metrics.series("data/unique_rows"), color=GREEN, linewidth=1.5)
    axes.set(ylabel="unique rows\nseen", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _plot_unique_documents(axes: "Axes", metrics: RunMetrics) -> None:
    """And the repeat factor on a scale of its own, to the right."""
    axes.plot(*metrics.series("data/unique_documents"), color=GREEN, linewidth=1.5)
    axes.set(ylabel="unique\ndocuments", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    right = axes.twinx()
    right.plot(*metrics.series("data/repeat_factor"), color=ORANGE, linewidth=1.5, linestyle=(0, (4, 2)))
    right.set_ylabel("repeat factor", color=ORANGE)
    right.set_ylim(0, max(2, right.get_ylim()[1]))
    right.tick_params(axis="y", colors=ORANGE)
    right.spines[["top", "left"]].set_visible(False)


PANELS = (_plot_loss, _plot_lr, _plot_gradient_norm, _plot_throughput, _plot_unique_rows, _plot_unique_documents)


def _shade_phases(axes: "Axes", plan: Plan) -> None:
    for i, phase in enumerate(plan.phases):
        name = f"{phase.name}: {phase.first} to {phase.last}"
        axes.axvspan(
            phase.first - 0.5, phase.last + 0.5, color=PHASE_COLORS[i % len(PHASE_COLORS)], linewidth=0, label=name
        )
        if i > 0:
            axes.axvline(phase.first - 0.5, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlim=(0.5, plan.last_step + 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def _save_figure(figure: "Figure", upper: "Axes", lower: "Axes", path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    lower.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    lower.set_xlabel("step")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
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
        axes.plot(*_unzip(curve.means), color=color, linewidth=1.8, label=curve.label)
        axes.plot(*_unzip(curve.points), "o", color=color, markersize=4)
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
    figure.savefig(path)


def _unzip(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]
