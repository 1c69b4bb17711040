"""A curve in a terminal: dots of braille characters, two by four in each cell, or asterisks where there are none.

https://www.unicode.org/charts/PDF/U2800.pdf: the character U+2800 + n has a dot for each bit of n.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BRAILLE = 0x2800
DOT_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # [column][row] within a cell
DOTS_ACROSS = 2
DOTS_DOWN = 4


class Point(NamedTuple):
    """A value at a step."""

    step: int
    value: float


class ChartCell(NamedTuple):
    """What stands in one cell of a chart."""

    character: str
    is_mark: bool


class Chart(NamedTuple):
    """A drawn curve."""

    rows: list[list[ChartCell]]  # from the top
    top: float  # value of the upper edge
    bottom: float  # value of the lower edge
    first_step: int
    last_step: int


def draw_chart(curve: Sequence[Point], marks: Sequence[Point], cells: int, rows: int, *, braille: bool) -> Chart | None:
    """Draw a curve and marks beside it, on a logarithmic scale if all is above 0; None if there is nothing to draw.

    Where a column of dots has several values, it shows their mean. Values that are not finite are left out.
    """
    curve = [point for point in curve if math.isfinite(point.value)]
    marks = [point for point in marks if math.isfinite(point.value)]
    points = [*curve, *marks]
    if not points:
        return None
    across = DOTS_ACROSS if braille else 1
    down = DOTS_DOWN if braille else 1
    first = min(point.step for point in points)
    last = max(point.step for point in points)
    columns = bin_curve(curve, first, last, cells * across)
    shown = [value for value in columns if value is not None] + [point.value for point in marks]
    top = max(shown)
    bottom = min(shown)
    scale = math.log if bottom > 0 else float

    def row_of(value: float, num_rows: int) -> int:
        height = scale(top) - scale(bottom)
        share = (scale(top) - scale(value)) / height if height else 0.5
        return min(num_rows - 1, max(0, int(share * num_rows)))

    dots = [[0] * cells for _ in range(rows)]
    before: int | None = None
    for column, value in enumerate(columns):
        if value is None:
            continue
        row = row_of(value, rows * down)
        for y in _rows_between(before, row):
            bit = DOT_BITS[column % across][y % down] if braille else 1
            dots[y // down][column // across] |= bit
        before = row
    picture = [[ChartCell(_character(bits, braille=braille), False) for bits in line] for line in dots]
    for point in marks:
        column = _column_of(point.step, first, last, cells)
        picture[row_of(point.value, rows)][column] = ChartCell("●" if braille else "o", True)
    return Chart(picture, top, bottom, first, last)


def bin_curve(curve: Sequence[Point], first: int, last: int, num_columns: int) -> list[float | None]:
    """The curve's value in each of so many columns: the mean, or between two columns that have one a straight line."""
    totals = np.zeros(num_columns)
    counts = np.zeros(num_columns)
    for point in curve:
        column = _column_of(point.step, first, last, num_columns)
        totals[column] += point.value
        counts[column] += 1
    known = np.flatnonzero(counts)
    values: list[float | None] = [None] * num_columns
    if not len(known):
        return values
    means = totals[known] / counts[known]
    for column in range(int(known[0]), int(known[-1]) + 1):
        values[column] = float(np.interp(column, known, means))
    return values


def _column_of(step: int, first: int, last: int, num_columns: int) -> int:
    if last == first:
        return 0
    return min(num_columns - 1, (step - first) * num_columns // (last - first))


def _rows_between(before: int | None, row: int) -> range:
    """The dots of a column: that of its value, and those that join it to the column before."""
    if before is None or before == row:
        return range(row, row + 1)
    return range(before + 1, row + 1) if before < row else range(row, before)


def _character(bits: int, *, braille: bool) -> str:
    if not bits:
        return " "
    return chr(BRAILLE + bits) if braille else "*"
