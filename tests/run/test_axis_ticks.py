"""Ticks: round numbers, as many as can be read, none written like another."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.run.axis_ticks import (
    drop_crowded,
    format_number,
    format_short,
    format_ticks,
    pick_linear_ticks,
    pick_log_ticks,
)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 0.0084, ["0", "0.002", "0.004", "0.006", "0.008"]),
        (0, 12_000, ["0", "2k", "4k", "6k", "8k", "10k", "12k"]),
        (0, 4800, ["0", "1,000", "2,000", "3,000", "4,000"]),
        (0, 3.3e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4", "2.5e-4", "3e-4"]),
        (-0.3, 0.3, ["-0.3", "-0.2", "-0.1", "0", "0.1", "0.2", "0.3"]),
        (7, 7, ["7"]),
    ],
)
def test_linear_ticks(low: float, high: float, labels: list[str]):
    assert format_ticks(pick_linear_ticks(low, high)) == labels


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (3.3, 7.9, ["4", "5", "6", "7"]),
        (2.4, 12, ["3", "4", "5", "6", "7", "8", "9", "10"]),
        (3.92, 4.31, ["4", "4.1", "4.2", "4.3"]),
        (0.02, 4, ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]),
        (1e-12, 1e6, ["1e-12", "1e-8", "1e-4", "1", "10k"]),
    ],
)
def test_logarithmic_ticks(low: float, high: float, labels: list[str]):
    assert format_ticks(pick_log_ticks(low, high)) == labels


@given(st.floats(1e-12, 1e12), st.floats(0, 6), st.integers(2, 8), st.sampled_from([pick_linear_ticks, pick_log_ticks]))
def test_ticks_lie_on_the_axis_and_differ_in_writing(low: float, decades: float, count: int, pick: object):
    high = low * 10**decades
    ticks = pick(low, high, count)  # type: ignore[operator]
    assert 1 <= len(ticks) <= 2 * count + 3
    assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in ticks)
    assert len(set(format_ticks(ticks))) == len(ticks), "no 0 0 0"


def test_numbers_in_a_text():
    assert [format_number(value) for value in (3.96354, 12345.6, 1.6e-05, 0, math.nan, -math.inf, None)] == [
        "3.964", "12,346", "1.6e-5", "0", "nan", "-inf", "-",
    ]  # fmt: skip
    assert [format_short(value) for value in (950, 614_400, 2_524_416, 3e12)] == ["950", "614k", "2.52M", "3T"]
    assert [format_short(value) for value in (999, 999_499, 999_500, 999_936)] == ["999", "999k", "1M", "1M"]


def test_of_labels_that_run_into_each_other_those_to_keep_stay():
    places, labels = [0.0, 0.5, 0.9, 1.0], ["1", "2,500", "5,000", "5,050"]
    assert drop_crowded(places, labels, 0.01, [0.9, 1.0]) == [True] * 4
    assert drop_crowded(places, labels, 0.022, [0.9, 1.0]) == [True, True, False, True]
    assert drop_crowded(places, labels, 0.022, [0.9]) == [True, True, True, False]
