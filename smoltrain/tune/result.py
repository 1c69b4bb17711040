"""What the runs of a grid say together: settings by their loss, the best, how sure that is, and where to look next.

Pure. All settings are trained with the same seeds, and a seed means the same weights, if the model is the same, and the
same rows. So settings are compared seed by seed, where what a seed brings along cancels out.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from smoltrain.tune.grid import Axis, GridPoint

GEOMETRIC_RATIO = 1.4  # of two neighbours on an axis, from which on the next value is a multiple and not a sum


@dataclass(frozen=True)
class Setting:
    """A point of the grid with what its runs came to. Losses in nats per token, seconds are wall clock."""

    point: GridPoint
    losses: dict[int, float]  # by seed, of the runs that did not diverge
    diverged_at: dict[int, int]  # by seed, the step
    tokens_per_s: float  # mean of the runs; NaN where no step was trained
    steps: int  # of each of its runs

    @property
    def loss(self) -> float:
        """Mean over the seeds; NaN if any diverged."""
        return math.nan if self.diverged_at or not self.losses else mean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Largest less smallest loss over the seeds; None of a single one."""
        if len(self.losses) < 2:
            return None
        return max(self.losses.values()) - min(self.losses.values())


@dataclass(frozen=True)
class Comparison:
    """How much worse another setting is than the best, seed by seed."""

    other: Setting
    mean: float
    least: float
    most: float
    num_seeds: int

    @property
    def is_told_apart(self) -> bool:
        """Whether the difference is larger than what the seeds make of it. One seed makes nothing of it."""
        return self.num_seeds > 1 and abs(self.mean) > self.most - self.least


def sort_settings(settings: Iterable[Setting]) -> list[Setting]:
    """The lowest loss first; those that diverged last, the one that did so latest before the others."""

    def key(setting: Setting) -> tuple[bool, float]:
        if setting.diverged_at:
            return True, -min(setting.diverged_at.values())
        return False, setting.loss

    return sorted(settings, key=key)


def compare_with_best(settings: Sequence[Setting]) -> list[Comparison]:
    """Every other setting that has a loss against the first of those that are sorted."""
    if not settings or settings[0].diverged_at:
        return []
    best, *others = settings
    comparisons: list[Comparison] = []
    for other in others:
        if other.diverged_at:
            continue
        differences = [other.losses[seed] - best.losses[seed] for seed in best.losses]
        comparisons.append(Comparison(other, mean(differences), min(differences), max(differences), len(differences)))
    return comparisons


@dataclass(frozen=True)
class Edge:
    """The best value lies at an end of its axis."""

    axis: Axis
    value: str  # as it was typed
    beyond: str | None  # the value to try next; None where there is none


def find_edges(best: GridPoint, axes: Sequence[Axis], is_valid: Callable[[Axis, str], bool]) -> list[Edge]:
    """The axes of numbers at whose end the best value lies, with the next value where `is_valid` accepts it."""
    values = dict(best.settings)
    edges: list[Edge] = []
    for axis in axes:
        numbers = read_numbers(axis.values)
        if numbers is None or len(numbers) < 2:
            continue
        value = values[axis.key]
        beyond = extrapolate(sorted(numbers), numbers[axis.values.index(value)])
        if beyond is None:
            continue
        text = format_like(beyond, axis.values)
        edges.append(Edge(axis, value, text if is_valid(axis, text) else None))
    return edges


def read_numbers(values: Sequence[str]) -> list[float] | None:
    """The values as numbers; None if one is no finite number."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def extrapolate(numbers: Sequence[float], value: float) -> float | None:
    """The next number beyond the end of an ascending row at which `value` stands; None if it stands inside."""
    if value == numbers[-1]:
        edge, inner = numbers[-1], numbers[-2]
    elif value == numbers[0]:
        edge, inner = numbers[0], numbers[1]
    else:
        return None
    smaller, larger = sorted((edge, inner))
    if smaller > 0 and larger / smaller >= GEOMETRIC_RATIO:
        return edge * edge / inner
    return 2 * edge - inner


def format_like(number: float, values: Sequence[str]) -> str:
    """A number as somebody would type it who has typed these: 8e-3 beside 4e-3, 1024 beside 512."""
    if all(value.lstrip("+-").isdigit() for value in values):
        return str(round(number))
    plain = f"{number:.3g}"
    if not all("e" in value.lower() for value in values):
        return plain
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
