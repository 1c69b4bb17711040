"""What a grid came to, for its reader: a table, the best as words to paste, how far to believe it; and as JSON.

Pure functions of what result.py has worked out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smoltrain.config.schema import PhaseSection
from smoltrain.run.plots import GridCurve
from smoltrain.tune.grid import Axis, GridPoint, describe_point, shorten_keys
from smoltrain.tune.result import Comparison, Edge, Setting, read_numbers
from smoltrain.tune.short_plan import is_much_shorter

MOST_NAMED = 3  # settings that are not told apart from the best


@dataclass(frozen=True)
class TuneReport:
    """All that is known at the end of a grid."""

    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]  # of the runs, the fewest first
    phase_steps: int  # that the recipe's own rows make of what each run trains
    planned_steps: int | None  # of the recipe's whole plan; None where nobody has counted them
    settings: list[Setting]  # sorted
    comparisons: list[Comparison]  # of the others with the first of these
    edges: list[Edge]
    recipes_own: GridPoint | None  # the point that is the recipe as it stands, if one is
    later_phases: tuple[PhaseSection, ...]  # which no run trained
    rows_note: str  # whether the runs of a seed trained on the same rows

    @property
    def best(self) -> Setting | None:
        """None if every setting diverged."""
        return None if not self.settings or self.settings[0].diverged_at else self.settings[0]


def build_settings_table(report: TuneReport) -> Table:
    """A row for each setting, the best first; a star is the recipe's own."""
    short = shorten_keys([axis.key for axis in report.axes])
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for axis in report.axes:
        table.add_column(short[axis.key], overflow="fold")
    table.add_column("loss", justify="right")
    if len(report.seeds) > 1:
        table.add_column("spread", justify="right")
    if len(report.steps) > 1:
        table.add_column("steps", justify="right")
    table.add_column("tokens/s", justify="right")
    for setting in report.settings:
        values = [value for _, value in setting.point.settings]
        if setting.point == report.recipes_own:
            values[-1] += " *"
        table.add_row(*values, *_format_numbers(setting, report))
    return table


def _format_numbers(setting: Setting, report: TuneReport) -> list[str]:
    num_seeds = len(report.seeds)
    loss = f"{setting.loss:.4f}"
    if setting.diverged_at:
        loss = _describe_divergence(setting, num_seeds)
    speed = "" if math.isnan(setting.tokens_per_s) else f"{setting.tokens_per_s:,.0f}"
    cells = [loss]
    if num_seeds > 1:
        cells.append("" if setting.spread is None or setting.diverged_at else f"{setting.spread:.4f}")
    if len(report.steps) > 1:
        cells.append(f"{setting.steps:,}")
    return [*cells, speed]


def _describe_divergence(setting: Setting, num_seeds: int) -> str:
    step = min(setting.diverged_at.values())
    of_seeds = f", {len(setting.diverged_at)} of {num_seeds} seeds" if num_seeds > 1 else ""
    return f"diverged at step {step}{of_seeds}"


def describe_loss_column(report: TuneReport) -> str:
    """What stands in the table."""
    text = f"validation loss after {format_steps(report.steps)}, nats per token; the best first"
    if len(report.seeds) > 1:
        text += f"; mean of {len(report.seeds)} seeds, and the largest less the smallest of them"
    if report.recipes_own:
        text += "; * is the recipe as it stands"
    return text


def format_steps(steps: Sequence[int]) -> str:
    """100 steps, or 50 to 100 steps: of the runs, the fewest first."""
    fewest = "" if len(steps) == 1 else f"{steps[0]:,} to "
    return f"{fewest}{steps[-1]:,} steps"


def list_verdicts(report: TuneReport) -> Iterator[str]:
    """The best setting, and everything that should be known before it is believed, a line each."""
    best = report.best
    if best is None:
        yield "WARNING: every setting diverged: try lower rates, or a longer warm-up"
        return
    is_own = best.point == report.recipes_own
    yield f"the best{', which the recipe has already' if is_own else ''}, as overrides:"
    yield f"  {' '.join(best.point.words)}"
    for edge in report.edges:
        yield _describe_edge(edge)
    yield from _describe_certainty(report.comparisons)
    if is_much_shorter(report.phase_steps, report.planned_steps):
        share = report.phase_steps / (report.planned_steps or 1)
        yield (
            f"WARNING: {report.phase_steps:,} steps are {share:.0%} of the plan's {report.planned_steps:,}, and the "
            "best rate depends on how long a run is: that of a longer one is lower as a rule (Bjorck et al. 2024)"
        )
    tuned = {axis.key.rpartition(".")[2] for axis in report.axes if axis.key.startswith("phases.")}
    for phase in report.later_phases:
        if "lr" in tuned and phase.lr is not None:
            yield f"not trained, so not tuned: phases.{phase.name}.lr stays {phase.lr:g}"


def _describe_edge(edge: Edge) -> str:
    name = edge.axis.key.rpartition(".")[2]
    numbers = [float(value) for value in edge.axis.values]
    which = "largest" if float(edge.value) == max(numbers) else "smallest"
    advice = f": try {edge.beyond} too" if edge.beyond else ""
    return f"WARNING: {name} {edge.value} is the {which} that was tried, so the best may lie beyond{advice}"


def _describe_certainty(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Which settings may be as good as the best."""
    if not comparisons:
        return
    nearest = comparisons[0]
    if nearest.num_seeds == 1:
        yield (
            f"the next, {describe_point(nearest.other.point)}, is {nearest.mean:.4f} worse with one seed; whether that "
            "is more than chance, --seeds 2 or 3 tells"
        )
        return
    alike = [comparison for comparison in comparisons if not comparison.is_told_apart]
    for comparison in alike[:MOST_NAMED]:
        yield (
            f"not told apart from the best: {describe_point(comparison.other.point)}: {comparison.mean:.4f} worse in "
            f"the mean, by seed {comparison.least:.4f} to {comparison.most:.4f}"
        )
    if len(alike) > MOST_NAMED:
        yield f"... and {len(alike) - MOST_NAMED} more that {nearest.num_seeds} seeds do not tell from it"
    if not alike:
        yield (
            f"the next, {describe_point(nearest.other.point)}, is {nearest.mean:.4f} worse in the mean, by seed "
            f"{nearest.least:.4f} to {nearest.most:.4f}"
        )


def report_to_json(report: TuneReport) -> dict[str, Any]:
    """The table and what was said of it, as plain values; what is no number is null."""
    rows = []
    for setting in report.settings:
        rows.append(
            {
                "settings": dict(setting.point.settings),
                "overrides": list(setting.point.words),
                "loss": _number(setting.loss),
                "spread": setting.spread,
                "losses": {str(seed): loss for seed, loss in setting.losses.items()},
                "diverged_at": {str(seed): step for seed, step in setting.diverged_at.items()},
                "tokens_per_s": _number(setting.tokens_per_s),
                "steps": setting.steps,
            }
        )
    return {
        "steps": report.steps[0] if len(report.steps) == 1 else None,
        "planned_steps": report.planned_steps,
        "seeds": list(report.seeds),
        "best": list(report.best.point.words) if report.best else None,
        "settings": rows,
        "rows": report.rows_note,
        "verdicts": list(list_verdicts(report)),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- the picture


def choose_drawn_axis(axes: Sequence[Axis]) -> int:
    """Which axis lies along the picture: a learning rate before other numbers, these before words."""

    def rank(place: int) -> int:
        if axes[place].key.endswith(".lr"):
            return 0
        return 1 if read_numbers(axes[place].values) else 2

    return min(range(len(axes)), key=rank)


def make_curves(report: TuneReport) -> tuple[list[GridCurve], dict[float, str]]:
    """(a curve for each combination of the other axes, the values along the picture and how they were typed)."""
    place = choose_drawn_axis(report.axes)
    axis = report.axes[place]
    numbers = read_numbers(axis.values) or [float(number) for number in range(len(axis.values))]
    x_of = dict(zip(axis.values, numbers, strict=True))
    curves: dict[str, GridCurve] = {}
    for setting in sorted(report.settings, key=lambda setting: x_of[setting.point.settings[place][1]]):
        others = tuple(pair for number, pair in enumerate(setting.point.settings) if number != place)
        label = describe_point(GridPoint(others, ()))
        curve = curves.setdefault(label, GridCurve(label, [], [], []))
        x = x_of[setting.point.settings[place][1]]
        curve.points.extend((x, loss) for loss in setting.losses.values())
        if setting.diverged_at:
            curve.diverged.append(x)
        else:
            curve.means.append((x, setting.loss))
    return [curves[label] for label in sorted(curves)], dict(zip(numbers, axis.values, strict=True))
