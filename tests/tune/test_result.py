"""What settings say together: order, comparisons seed by seed, edges of axes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.tune.grid import Axis, GridPoint
from smoltrain.tune.result import (
    Setting,
    compare_with_best,
    extrapolate,
    find_edges,
    format_like,
    read_numbers,
    sort_settings,
)


def setting(value: str, *losses: float, diverged: dict[int, int] | None = None) -> Setting:
    point = GridPoint((("phases.main.lr", value),), (f"phases.main.lr={value}",))
    return Setting(point, dict(enumerate(losses)), diverged or {}, 100.0, 30)


def values(settings: list[Setting]) -> list[str]:
    return [setting.point.settings[0][1] for setting in settings]


def test_the_lowest_mean_is_first_and_who_diverged_last():
    rows = [
        setting("a", 3.0, 3.2),
        setting("late", 1.0, diverged={1: 50}),
        setting("b", 3.1, 2.9),
        setting("early", diverged={0: 9, 1: 60}),
    ]
    assert values(sort_settings(rows)) == ["b", "a", "late", "early"]


def test_mean_and_spread_over_seeds():
    assert setting("a", 3.0, 3.5, 3.1).loss == pytest.approx(3.2)
    assert setting("a", 3.0, 3.5, 3.1).spread == pytest.approx(0.5)
    assert setting("a", 3.0).spread is None
    assert math.isnan(setting("a", 3.0, diverged={1: 5}).loss)


@pytest.mark.parametrize(
    ("best", "other", "told_apart"),
    [
        ((3.0, 4.0), (3.1, 4.1), True),  # the seeds differ by far more than the settings, but alike in both
        ((3.0, 4.0), (3.1, 3.98), False),  # by one seed the other is the better one
        ((3.0, 3.0), (3.01, 3.2), False),  # 0.105 of 0.19
        ((3.0, 3.0), (3.1, 3.2), True),  # 0.15 of 0.1
        ((3.0, 3.0), (3.0, 3.0), False),
        ((3.0,), (3.1,), False),  # one seed tells nothing
    ],
)
def test_settings_are_told_apart_seed_by_seed(best: tuple[float, ...], other: tuple[float, ...], told_apart: bool):
    [comparison] = compare_with_best([setting("a", *best), setting("b", *other)])
    assert comparison.is_told_apart == told_apart
    differences = [b - a for a, b in zip(best, other, strict=True)]
    assert comparison.mean == pytest.approx(sum(differences) / len(differences))
    assert (comparison.least, comparison.most) == (min(differences), max(differences))


def test_who_diverged_is_compared_with_nobody():
    diverged = setting("c", diverged={0: 5})
    assert [c.other for c in compare_with_best([setting("a", 1.0), setting("b", 2.0), diverged])] == [setting("b", 2.0)]
    assert compare_with_best([diverged]) == []


# --- edges


@pytest.mark.parametrize(
    ("numbers", "value", "beyond"),
    [
        ([1e-3, 2e-3, 4e-3], 4e-3, 8e-3),
        ([1e-3, 2e-3, 4e-3], 1e-3, 5e-4),
        ([1e-3, 2e-3, 4e-3], 2e-3, None),
        ([3, 10], 10, 100 / 3),
        ([0, 0.1], 0.1, 0.2),
        ([0, 0.1], 0, -0.1),
        ([0.9, 0.95], 0.95, 1.0),  # near each other: a sum
        ([3, 5], 5, 25 / 3),
    ],
)
def test_the_next_value_goes_on_as_the_axis_does(numbers: list[float], value: float, beyond: float | None):
    found = extrapolate(numbers, value)
    assert found == (beyond if beyond is None else pytest.approx(beyond))


@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=6, unique=True))
def test_the_next_value_lies_outside_of_the_axis(numbers: list[float]):
    ascending = sorted(numbers)
    upper = extrapolate(ascending, ascending[-1])
    lower = extrapolate(ascending, ascending[0])
    assert upper is not None
    assert lower is not None
    assert upper >= ascending[-1]
    assert lower <= ascending[0]


@pytest.mark.parametrize(
    ("number", "like", "text"),
    [
        (8e-3, ("2e-3", "4e-3"), "8e-3"),
        (3.3333e-2, ("3e-3", "1e-2"), "3.3e-2"),
        (0.008, ("0.002", "0.004"), "0.008"),
        (1024.0, ("256", "512"), "1024"),
        (25 / 3, ("3", "5"), "8"),
    ],
)
def test_numbers_are_written_as_their_neighbours_are(number: float, like: tuple[str, ...], text: str):
    assert format_like(number, like) == text


def test_edges_of_the_best_setting():
    lr = Axis("phases.main.lr", ("1e-3", "4e-3", "2e-3"), ())  # in any order
    decay = Axis("phases.main.weight_decay", ("0", "0.1"), ())
    kind = Axis("optimizer.kind", ("adamw", "muon"), ())
    best = GridPoint((("phases.main.lr", "4e-3"), ("phases.main.weight_decay", "0"), ("optimizer.kind", "muon")), ())
    found = find_edges(best, (lr, decay, kind), lambda _axis, value: not value.startswith("-"))
    assert [(edge.axis, edge.value, edge.beyond) for edge in found] == [(lr, "4e-3", "8e-3"), (decay, "0", None)]
    inside = GridPoint((("phases.main.lr", "2e-3"),), ())
    assert find_edges(inside, (lr,), lambda _axis, _value: True) == []
    assert find_edges(inside, (Axis("phases.main.lr", ("2e-3",), ()),), lambda _axis, _value: True) == []


def test_words_are_no_numbers():
    assert read_numbers(("1", "2e-3", ".5")) == [1.0, 2e-3, 0.5]
    assert read_numbers(("adamw", "1")) is None
    assert read_numbers(("nan", "1")) is None
