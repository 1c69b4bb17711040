"""Pictures as PNG files. matplotlib's object interface throughout: no window, no global state."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from smoltrain.plan import Plan

BLUE, ORANGE, GREY = "#2a6fb0", "#d1661f", "#5f6b76"
BANDS = ("#e6eef7", "#fbeed6", "#e4f2e3", "#f3e6f2")  # one per phase, in turn


def plan_png(plan: Plan, path: Path) -> None:
    """Draw learning rate and weight decay over the steps, each phase shaded and named."""
    figure = Figure(figsize=(9, 4.8), dpi=140, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = range(1, plan.last_step + 1)
    edges = [step - 0.5 for step in (*steps, plan.last_step + 1)]
    for axes, values, color, label in (
        (upper, [plan.lr(step) for step in steps], BLUE, "learning rate"),
        (lower, [plan.weight_decay(step) for step in steps], GREY, "weight decay"),
    ):
        _shade_phases(axes, plan)
        axes.stairs(values, edges, baseline=None, color=color, linewidth=2)
        axes.set(ylim=(0, 1.1 * max(values) or 1), ylabel=label)
    upper.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    _finish(figure, upper, lower, path)


def training_png(plan: Plan, metrics: Path, path: Path) -> None:
    """Draw a run's metrics.jsonl: training and validation loss (log scale), learning rate below."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]

    def series(name: str) -> tuple[list[int], list[float]]:
        found = [(line["step"], line[name]) for line in lines if name in line]
        return [step for step, _ in found], [value for _, value in found]

    figure = Figure(figsize=(9, 5.6), dpi=140, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for axes in (upper, lower):
        _shade_phases(axes, plan)
    upper.plot(*series("train/loss_nats_per_token"), color=BLUE, linewidth=1.2, label="training loss")
    upper.plot(*series("validation/loss_nats_per_token"), "o-", color=ORANGE, markersize=4, label="validation loss")
    upper.set(yscale="log", ylabel="loss, nats per token")
    upper.yaxis.set_major_formatter("{x:g}")
    upper.yaxis.set_minor_formatter("{x:g}")
    lower.plot(*series("train/lr"), color=GREY, linewidth=1.5)
    lower.set(ylabel="learning rate", ylim=(0, None))
    _finish(figure, upper, lower, path)


def _shade_phases(axes: Axes, plan: Plan) -> None:
    for i, phase in enumerate(plan.phases):
        name = f"{phase.name}: {phase.first} to {phase.last}"
        axes.axvspan(phase.first - 0.5, phase.last + 0.5, color=BANDS[i % len(BANDS)], linewidth=0, label=name)
        if i > 0:
            axes.axvline(phase.first - 0.5, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlim=(0.5, plan.last_step + 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, upper: Axes, lower: Axes, path: Path) -> None:
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    lower.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    lower.set_xlabel("step")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
