"""An axis of steps on which every phase can be seen: one of 50 steps after one of 5000 is drawn wider than it is."""

import itertools
from dataclasses import dataclass

import numpy as np

from smoltrain.run.axis_ticks import drop_crowded, format_ticks, pick_linear_ticks
from smoltrain.schedule import Plan

MIN_SHARE = 0.12  # of the axis, that a phase has at least; less where there are many
NARROW = 0.022  # of the axis, that a character of a label takes on a phone
WIDE = 0.009  # and on a desk


@dataclass(frozen=True)
class Stretch:
    """Part of an axis. Places are shares of its length, 0 at the left."""

    name: str  # of the phase
    first: int  # step
    last: int
    left: float
    right: float


@dataclass(frozen=True)
class AxisTick:
    """A place on an axis, and its label."""

    place: float
    label: str


class StepAxis:
    """Steps first..last of a plan, as places from 0 to 1: even within each phase, and short phases are widened."""

    def __init__(self, plan: Plan, first: int, last: int) -> None:
        """Steps past the plan's end, of an older plan, belong to its last phase."""
        spans = [
            (phase.name, max(phase.first, first), last if phase is plan.phases[-1] else min(phase.last, last))
            for phase in plan.phases
        ]
        spans = [span for span in spans if span[1] <= span[2]] or [(plan.phases[-1].name, first, last)]
        lengths = np.array([end - begin + 1 for _, begin, end in spans], np.float64)
        widths = _widen_short(lengths / lengths.sum())
        self._places = np.concatenate([[0.0], np.cumsum(widths)])
        self._places[-1] = 1.0
        self._edges = np.array([spans[0][1] - 0.5, *(end + 0.5 for _, _, end in spans)])
        self.is_even = bool(np.allclose(widths, lengths / lengths.sum()))
        self.stretches = [
            Stretch(name, begin, end, float(left), float(right))
            for (name, begin, end), left, right in zip(spans, self._places[:-1], self._places[1:], strict=True)
        ]

    def place(self, steps: np.ndarray) -> np.ndarray:
        """Where steps stand."""
        return np.interp(steps, self._edges, self._places)

    def ticks(self, count: int = 6, character: float = NARROW) -> list[AxisTick]:
        """The last step of each phase, and round ones between, as far as their labels fit."""
        ends = [stretch.last for stretch in self.stretches]
        steps = {self.stretches[0].first, *ends}
        for stretch in self.stretches:
            wanted = max(1, round(count * (stretch.right - stretch.left)))
            steps.update(int(tick) for tick in pick_linear_ticks(stretch.first, stretch.last, wanted) if tick % 1 == 0)
        return self._label(sorted(steps), [float(step) for step in sorted(steps)], ends, character)

    def ticks_of(
        self, steps: np.ndarray, values: np.ndarray, count: int = 6, character: float = NARROW
    ) -> list[AxisTick]:
        """Round values of what grows with the steps, as tokens do, where the steps reach them."""
        if len(values) < 2 or not values[-1] > values[0]:
            return []
        ticks = [tick for tick in pick_linear_ticks(values[0], values[-1], count) if tick > 0]
        return self._label(np.interp(ticks, values, steps).tolist(), ticks, [], character)

    def _label(self, steps: list[float], values: list[float], keep: list[int], character: float) -> list[AxisTick]:
        places = self.place(np.array(steps)).tolist()
        labels = format_ticks(values)
        chosen = drop_crowded(places, labels, character, self.place(np.array(keep, np.float64)).tolist())
        ticks = [AxisTick(place, label) for place, label in zip(places, labels, strict=True)]
        return list(itertools.compress(ticks, chosen))


def _widen_short(shares: np.ndarray) -> np.ndarray:
    """The same shares, none below the least one; what the short ones gain the others lose, each in proportion."""
    least = min(MIN_SHARE, 0.5 / len(shares))
    is_short = shares < least
    rest = 1 - least * is_short.sum()
    return np.where(is_short, least, shares * rest / max(shares[~is_short].sum(), 1e-9))
