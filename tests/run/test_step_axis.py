"""The axis of steps: every phase has a part of it that can be seen."""

import numpy as np
import pytest

from smoltrain.config.schema import PhaseSection
from smoltrain.run.step_axis import MIN_SHARE, WIDE, StepAxis
from smoltrain.schedule import Plan


def plan(*steps: int) -> Plan:
    return Plan(tuple(PhaseSection(name=f"p{n}", steps=count, lr=1e-3) for n, count in enumerate(steps)))


def test_a_short_phase_after_a_long_one_is_wide_enough_and_has_its_labels():
    axis = StepAxis(plan(5000, 50), 1, 5050)
    assert not axis.is_even
    assert axis.place(np.array([0.5, 5000.5, 5050.5])).tolist() == pytest.approx([0, 1 - MIN_SHARE, 1])
    assert axis.place(np.array([2500.5]))[0] == pytest.approx((1 - MIN_SHARE) / 2), "even within a phase"
    labels = [tick.label for tick in axis.ticks(8, WIDE)]
    assert labels == ["1", "1,000", "2,000", "3,000", "4,000", "5,000", "5,050"]
    assert [tick.label for tick in axis.ticks()] == ["1", "1,000", "2,000", "3,000", "4,000", "5,050"], "on a phone"


@pytest.mark.parametrize("steps", [(300,), (250, 50), (1,), (1000,) * 3])
def test_phases_that_can_be_seen_keep_their_widths(steps: tuple[int, ...]):
    axis = StepAxis(plan(*steps), 1, sum(steps))
    assert axis.is_even
    ends = np.cumsum(steps)
    assert [stretch.right for stretch in axis.stretches] == pytest.approx((ends / ends[-1]).tolist())


def test_many_short_phases_share_the_axis():
    axis = StepAxis(plan(10_000, *[1] * 40), 1, 10_040)
    widths = [stretch.right - stretch.left for stretch in axis.stretches]
    assert sum(widths) == pytest.approx(1)
    assert min(widths) == pytest.approx(0.5 / 41)


def test_an_axis_ends_where_the_run_does_and_may_begin_late():
    axis = StepAxis(plan(5000, 50), 4001, 4500)
    assert [(stretch.name, stretch.first, stretch.last) for stretch in axis.stretches] == [("p0", 4001, 4500)]
    past_the_plan = StepAxis(plan(10), 1, 20)
    assert past_the_plan.stretches[0].last == 20


def test_tokens_stand_above_the_steps_that_reached_them():
    axis = StepAxis(plan(100), 1, 100)
    ticks = axis.ticks_of(np.arange(1, 101), 1000.0 * np.arange(1, 101))
    assert [tick.label for tick in ticks] == ["20k", "40k", "60k", "80k", "100k"]
    assert [tick.place for tick in ticks] == pytest.approx(axis.place(np.array([20, 40, 60, 80, 100])).tolist())
    assert axis.ticks_of(np.array([1]), np.array([1.0])) == []
