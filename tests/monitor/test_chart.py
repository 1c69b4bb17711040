"""A curve of dots: where they stand."""

import math

import pytest

from smoltrain.monitor.chart import BRAILLE, DOT_BITS, Point, bin_curve, draw_chart

FALLING = [Point(step, 8.0 / step) for step in range(1, 101)]


def dots_of(rows: list[str]) -> dict[int, list[int]]:
    """Column of dots -> the rows of its dots, from the top."""
    found: dict[int, list[int]] = {}
    for y, row in enumerate(rows):
        for x, character in enumerate(row):
            bits = ord(character) - BRAILLE if character != " " else 0
            for column in (0, 1):
                for line in range(4):
                    if bits & DOT_BITS[column][line]:
                        found.setdefault(2 * x + column, []).append(4 * y + line)
    return found


def test_a_falling_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    chart = draw_chart(FALLING, [], cells=20, rows=6, braille=True)
    assert chart is not None
    rows = ["".join(cell.character for cell in row) for row in chart.rows]
    assert [len(row) for row in rows] == [20] * 6
    dots = dots_of(rows)
    assert sorted(dots) == list(range(40)), "a dot in every column"
    lowest = [max(dots[column]) for column in range(40)]
    assert lowest == sorted(lowest)
    assert (min(dots[0]), lowest[-1]) == (0, 23), "from edge to edge"
    for column in range(1, 40):
        assert min(dots[column]) - max(dots[column - 1]) <= 1, "joined"
    assert chart.top == bin_curve(FALLING, 1, 100, 40)[0]
    assert (chart.first_step, chart.last_step) == (1, 100)
    assert chart.top > chart.bottom > 8.0 / 100


def test_a_scale_is_logarithmic_where_it_can_be() -> None:
    curve = [Point(1, 10.0), Point(2, 1.0), Point(3, 0.1)]
    positive = draw_chart(curve, [], cells=3, rows=9, braille=False)
    assert positive is not None
    assert [y for y, row in enumerate(positive.rows) if row[1].character == "*"] == [1, 2, 3, 4], "half way down"
    signed = draw_chart([*curve, Point(4, -5.0)], [], cells=4, rows=9, braille=False)
    assert signed is not None
    assert signed.rows[-1][3].character == "*"


def test_marks_stand_beside_the_curve() -> None:
    chart = draw_chart([Point(1, 4.0), Point(101, 2.0)], [Point(51, 8.0)], cells=11, rows=5, braille=False)
    assert chart is not None
    marks = [(y, x) for y, row in enumerate(chart.rows) for x, cell in enumerate(row) if cell.is_mark]
    assert marks == [(0, 5)]
    assert chart.top == 8.0


def test_what_is_not_finite_is_left_out() -> None:
    bad = [Point(2, math.nan), Point(3, math.inf)]
    chart = draw_chart([Point(1, 4.0), *bad], [Point(2, math.nan)], cells=5, rows=3, braille=True)
    assert chart is not None
    assert (chart.top, chart.bottom, chart.last_step) == (4.0, 4.0, 1)
    assert draw_chart(bad, [], cells=5, rows=3, braille=True) is None


def test_columns_have_means_and_lines_between_them() -> None:
    curve = [Point(0, 1.0), Point(1, 3.0), Point(8, 8.0)]
    assert bin_curve(curve, 0, 8, 4) == pytest.approx([2.0, 4.0, 6.0, 8.0])
    assert bin_curve([], 0, 8, 2) == [None, None]
    assert bin_curve([Point(4, 1.0)], 0, 8, 2) == [None, 1.0]
