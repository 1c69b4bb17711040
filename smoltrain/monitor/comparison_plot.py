"""The losses of several runs in one picture: over steps, tokens and hours, one panel below the other.

matplotlib is imported when something is drawn; its object interface throughout: no window, no global state.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smoltrain.files import report_unwritable
from smoltrain.monitor.compare import ComparedRun
from smoltrain.monitor.curves import average_neighbours
from smoltrain.run.plots import CURVE_COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = (("steps", "step"), ("tokens", "tokens trained on, all ranks"), ("hours", "hours of all starts"))


def draw_comparison(runs: Sequence[ComparedRun]) -> "Figure":
    """A panel for each axis that one of the runs has: training losses as lines, validation losses as dots joined."""
    from matplotlib.figure import Figure

    panels = [(name, label) for name, label in AXES if any(_has_axis(run, name) for run in runs)] or [AXES[0]]
    figure = Figure(figsize=(9, 3.6 * len(panels) + 0.5), dpi=130, layout="constrained")
    column = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (name, label) in zip(column, panels, strict=True):
        _draw_panel(axes, runs, name, label)
    handles, labels = column[0].get_legend_handles_labels()
    if handles:
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name with dollars is no formula
    return figure


def _has_axis(run: ComparedRun, name: str) -> bool:
    return bool(np.isfinite(run.curves.training.axis(name)).any())


def _draw_panel(axes: "Axes", runs: Sequence[ComparedRun], name: str, label: str) -> None:
    for number, run in enumerate(runs):
        color = CURVE_COLORS[number % len(CURVE_COLORS)]
        training = run.curves.training
        validation = run.curves.validation
        x, y = average_neighbours(training.axis(name), training.losses)
        axes.plot(x, y, color=color, linewidth=1, alpha=0.5)
        x, y = average_neighbours(validation.axis(name), validation.losses)
        text = f" {run.label}"  # matplotlib leaves out of a legend what begins with an underscore
        axes.plot(x, y, "o-", color=color, markersize=3.5, linewidth=1.6, label=text)
    axes.set(xlabel=label, ylabel="loss, nats per token\nlines: training, dots: validation")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e6e9")
    axes.margins(x=0.01)
    if name == "hours":
        axes.set_xlim(left=0)  # so that what a start took is seen
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")


def render_png(runs: Sequence[ComparedRun]) -> bytes:
    """The picture as a PNG."""
    buffer = io.BytesIO()
    draw_comparison(runs).savefig(buffer, format="png")
    return buffer.getvalue()


def write_picture(path: Path, content: bytes, option: str) -> None:
    """Write a file that was asked for. Errors: UserError, blaming `option`, where it cannot be written."""
    with report_unwritable("the comparison", "a file in a folder that is there and may be written", option):
        path.write_bytes(content)
