"""Charts as the page draws them (page.html): curves in an SVG that stretches to any width, labels as HTML around it.

So text keeps its size on a phone. Everything is measured in a box of 1000 x 1000, its left upper corner at 0, 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from smoltrain.run.axis_ticks import format_number, format_ticks, pick_linear_ticks, pick_log_ticks
from smoltrain.run.run_metrics import RunMetrics
from smoltrain.run.step_axis import WIDE, AxisTick, StepAxis, Stretch
from smoltrain.run.thin_series import smooth_series, thin_series

BOX = 1000
SMOOTHED = 200  # values, from which on a running median is drawn too
MANY_DOTS = 80  # values, above which none has a dot of its own
HEAT_BINS = 160  # cells of a row at most
SMALL_HEIGHT = 170  # pixels, of charts that stand two in a row
MARGIN = 0.05  # of the range of values, above and below


@dataclass(frozen=True)
class Series:
    """Numbers to draw over the steps."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    color: str = "a"  # of the page's: a, b, c, ...
    is_noisy: bool = False  # one value per step, to be smoothed
    has_dots: bool = False  # few values, each of which is a measurement


@dataclass(frozen=True)
class DrawnPath:
    """A path of the SVG and its class in the style sheet."""

    kind: str
    path: str


@dataclass(frozen=True)
class LineChart:
    """What the page needs to draw lines."""

    title: str
    paths: list[DrawnPath]
    legend: list[tuple[str, str]]  # (colour, label), where there is more than one
    x_ticks: list[AxisTick]
    wide_x_ticks: list[AxisTick]  # where the window is wide
    y_ticks: list[AxisTick]  # places from the top
    token_ticks: list[AxisTick]
    phases: list[Stretch]
    notes: list[str]
    last: str  # the newest value, in words
    height: int  # pixels

    @property
    def is_wide(self) -> bool:
        """Whether it has a row of the page to itself."""
        return self.height > SMALL_HEIGHT


@dataclass(frozen=True)
class HeatMap:
    """What the page needs to draw a row of coloured cells for each name."""

    title: str
    rows: list[str]
    levels: list[DrawnPath]
    x_ticks: list[AxisTick]
    wide_x_ticks: list[AxisTick]  # where the window is wide
    low: str  # what the first and the last colour stand for
    high: str
    notes: list[str]
    height: int
    is_wide: bool = True


@dataclass(frozen=True)
class Charts:
    """Draws the numbers of one run over one axis of steps."""

    metrics: RunMetrics
    axis: StepAxis
    x_ticks: list[AxisTick] = field(default_factory=list)
    wide_x_ticks: list[AxisTick] = field(default_factory=list)

    def series(self, name: str, label: str = "", color: str = "a", *, factor: float = 1.0, **kind: bool) -> Series:
        """A logged name as a series, its values times `factor`."""
        steps, values = self.metrics.series(name)
        return Series(label or name, steps, values * factor, color, **kind)

    def draw_name(
        self, title: str, name: str, color: str = "a", *, factor: float = 1.0, is_noisy: bool = False,
        has_dots: bool = False, is_log: bool = False, from_zero: bool = False,
    ) -> LineChart | None:  # fmt: skip
        """One logged name alone, in a small chart."""
        series = self.series(name, color=color, factor=factor, is_noisy=is_noisy, has_dots=has_dots)
        return self.draw_lines(title, series, is_log=is_log, from_zero=from_zero)

    def draw_lines(
        self, title: str, *series: Series, is_log: bool = False, from_zero: bool = False, height: int = SMALL_HEIGHT,
        token_ticks: Sequence[AxisTick] = (),
    ) -> LineChart | None:  # fmt: skip
        """None where nothing was logged."""
        drawn = [one for one in series if len(one.values)]
        if not drawn:
            return None
        values = np.concatenate([one.values for one in drawn])
        finite = values[np.isfinite(values)]
        is_log = is_log and bool((finite > 0).any())
        scale = _ValueScale.fit(finite, is_log=is_log, from_zero=from_zero)
        paths = [path for one in drawn for path in self._draw_one(one, scale)]
        notes: list[str] = []
        num_left_out = len(values) - len(finite)
        if num_left_out:
            notes.append(f"{num_left_out:,} values are not finite (squares at the top)")
        if is_log and (num_low := int((finite <= 0).sum())):
            notes.append(f"{num_low:,} values are not above 0 and are left out of the logarithmic scale")
        y_ticks = scale.ticks(4 if height == SMALL_HEIGHT else 6) if len(finite) else []
        legend = [(one.color, one.label) for one in drawn] if len(drawn) > 1 else []
        return LineChart(
            title, paths, legend, self.x_ticks, self.wide_x_ticks,
            y_ticks, list(token_ticks), self.axis.stretches, notes,
            format_number(float(drawn[0].values[-1])), height,
        )  # fmt: skip

    def _draw_one(self, one: Series, scale: "_ValueScale") -> list[DrawnPath]:
        places = self.axis.place(one.steps)
        is_drawn = np.isfinite(one.values) & ((one.values > 0) | (not scale.is_log))
        x = places[is_drawn]
        y = one.values[is_drawn]
        paths: list[DrawnPath] = []
        is_smoothed = one.is_noisy and len(y) >= SMOOTHED
        if len(y):
            kind = f"line {one.color}{' faint' if is_smoothed else ''}"
            paths.append(DrawnPath(kind, _join(*thin_series(x, y), scale)))
        if is_smoothed:
            paths.append(DrawnPath(f"line {one.color}", _join(*smooth_series(x, y), scale)))
        if len(y) == 1 or (one.has_dots and len(y) <= MANY_DOTS):
            paths.append(DrawnPath(f"dots {one.color}", _dot(x, scale.place(y))))
        missing = np.unique(np.round(places[~np.isfinite(one.values)], 3))
        if len(missing):
            paths.append(DrawnPath("missing", _dot(missing, np.full(len(missing), 0.02))))
        return paths

    def draw_heat_map(self, title: str, prefix: str, num_levels: int = 10) -> HeatMap | None:
        """A row for each name with this prefix, by the logarithm; where values are many, the largest of a stretch."""
        names = self.metrics.names(prefix)
        columns = {name: self.metrics.series(name) for name in names}
        if not columns:
            return None
        positive = np.concatenate([values[np.isfinite(values) & (values > 0)] for _, values in columns.values()])
        low = float(positive.min()) if len(positive) else 1.0
        high = float(positive.max()) if len(positive) else 1.0
        cells: dict[int, list[str]] = {}
        num_bad = 0
        for number, (steps, values) in enumerate(columns.values()):
            num_bad += int((~np.isfinite(values)).sum())
            edges, peaks = _bin_peaks(self.axis, steps, values, HEAT_BINS)
            for left, right, value in zip(edges[:-1], edges[1:], peaks, strict=True):
                level = _level_of(float(value), low, high, num_levels)
                cells.setdefault(level, []).append(_cell(left, right, number, len(names)))
        levels = [
            DrawnPath(f"heat{level}" if level >= 0 else "heatbad", "".join(parts)) for level, parts in cells.items()
        ]
        notes = [f"{num_bad:,} values are not finite"] if num_bad else []
        height = min(26 * len(names), max(320, 9 * len(names)))
        rows = [name.removeprefix(prefix) for name in names]
        colors = (format_number(low, 3), format_number(high, 3))
        return HeatMap(title, rows, levels, self.x_ticks, self.wide_x_ticks, *colors, notes, height)


def open_charts(metrics: RunMetrics, axis: StepAxis) -> Charts:
    """With the ticks that all charts share."""
    return Charts(metrics, axis, axis.ticks(), axis.ticks(8, WIDE))


@dataclass(frozen=True)
class _ValueScale:
    """From values to shares of the height, 0 at the top."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def fit(cls, finite: np.ndarray, *, is_log: bool, from_zero: bool) -> "_ValueScale":
        shown = finite[finite > 0] if is_log else finite
        low = float(shown.min()) if len(shown) else 0.0
        high = float(shown.max()) if len(shown) else 1.0
        if from_zero:
            low = min(low, 0.0)
            high = max(high, 0.0)
        if is_log:
            margin = (high / low) ** MARGIN if high > low else 1.5
            return cls(low / margin, high * margin, is_log)
        margin = (high - low) * MARGIN or abs(high) * MARGIN or 1.0
        return cls(low if from_zero and low == 0 else low - margin, high + margin, is_log)

    def place(self, values: np.ndarray) -> np.ndarray:
        if self.is_log:
            return 1 - np.log(values / self.low) / np.log(self.high / self.low)
        return 1 - (values - self.low) / (self.high - self.low)

    def ticks(self, count: int) -> list[AxisTick]:
        values = (pick_log_ticks if self.is_log else pick_linear_ticks)(self.low, self.high, count)
        places = self.place(np.array(values)).tolist()
        return [AxisTick(place, label) for place, label in zip(places, format_ticks(values), strict=True)]


def _join(places: np.ndarray, values: np.ndarray, scale: _ValueScale) -> str:
    """A line through these points."""
    x = np.round(places * BOX, 1)
    y = np.round(scale.place(values) * BOX, 1)
    return "M" + "L".join(f"{left:g} {top:g}" for left, top in zip(x, y, strict=True))


def _dot(x: np.ndarray, y: np.ndarray) -> str:
    """Lines without length: with round ends they are dots, however the box is stretched."""
    return "".join(f"M{left * BOX:.1f} {top * BOX:.1f}h0" for left, top in zip(x, y, strict=True))


def _bin_peaks(axis: StepAxis, steps: np.ndarray, values: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(edges, values) of cells: each value reaches half way to the next one; where they are many, bins of the axis.

    A bin has its largest value, or NaN where one of them is not finite. Steps that stand twice count once.
    """
    steps, order = np.unique(steps[::-1], return_index=True)
    values = values[::-1][order]
    places = axis.place(steps)
    middles = (places[:-1] + places[1:]) / 2
    edges = np.concatenate([[0.0], middles, [1.0]])
    if len(values) <= num_bins:
        return edges, values
    starts = np.unique(np.searchsorted(places, np.linspace(0, 1, num_bins, endpoint=False)).clip(max=len(places) - 1))
    peaks = np.maximum.reduceat(np.where(np.isfinite(values), values, np.nan), starts)
    return np.concatenate([edges[starts], [1.0]]), peaks


def _level_of(value: float, low: float, high: float, num_levels: int) -> int:
    """The colour's number; -1 for a value that is not finite."""
    if not np.isfinite(value):
        return -1
    if value <= low or low == high:
        return 0
    return min(num_levels - 1, int(num_levels * np.log(value / low) / np.log(high / low)))


def _cell(left: float, right: float, row: int, num_rows: int) -> str:
    top = BOX * row / num_rows
    bottom = BOX * (row + 1) / num_rows
    return f"M{left * BOX:.1f} {top:.1f}H{right * BOX:.1f}V{bottom:.1f}H{left * BOX:.1f}z"
