"""What is read off the validation losses of a run."""

from pathlib import Path

import pytest

from benchmarks.loss_curves import (
    Entry,
    choose_best_rate,
    describe_edge,
    draw_curves,
    find_steps_until,
    measure_reached,
)
from benchmarks.watching import Evaluation, TrainerRecord

NAN = float("nan")


def record(*losses: float, step_s: float = 1.0, start_s: float = 50.0, waited_s: float = 0.0) -> TrainerRecord:
    """A run that is evaluated every 10 steps, each time for 5 s; its first step has the start in it."""
    steps = 10 * len(losses)
    at_s = [start_s + (10 * (i + 1) - 1) * step_s + 5 * (i + 1) for i in range(len(losses))]
    evaluations = [Evaluation(10 * (i + 1), loss, 5.0, at_s[i]) for i, loss in enumerate(losses)]
    seconds = [start_s] + (steps - 1) * [step_s]
    waits: list[float | None] = [waited_s] * steps
    return TrainerRecord(start_s, seconds, waits, steps * [3.0], evaluations=evaluations)


@pytest.mark.parametrize(
    ("loss", "first", "between"),
    [
        (4.0, 20, 20.0),  # met exactly
        (3.5, 30, 25.0),
        (5.5, 10, 10.0),  # nothing stands before the first evaluation
        (2.9, None, None),
        (3.0, 30, 30.0),
    ],
)
def test_a_loss_is_reached_at_the_first_evaluation_or_between_two(
    loss: float, first: int | None, between: float | None
):
    run = record(5.0, 4.0, 3.0, 3.2)
    assert find_steps_until(run.evaluations, loss, interpolate=False) == first
    assert find_steps_until(run.evaluations, loss, interpolate=True) == (between and pytest.approx(between))


def test_a_curve_that_comes_back_has_reached_the_loss_the_first_time():
    run = record(5.0, 3.0, 4.0, 2.0)
    assert find_steps_until(run.evaluations, 3.5, interpolate=False) == 20
    assert find_steps_until(record(5.0, NAN, 3.0).evaluations, 3.5, interpolate=True) == 30, "no line from no number"


def test_the_best_rate_has_the_lowest_finite_loss_at_the_end():
    assert choose_best_rate({1e-3: 4.4, 2e-3: 4.3, 4e-3: 4.35}) == 2e-3
    assert choose_best_rate({1e-3: NAN, 2e-3: 4.4, 4e-3: float("-inf")}) == 2e-3
    assert choose_best_rate({4e-3: 4.3, 2e-3: 4.3}) == 2e-3


def test_a_best_rate_at_the_edge_is_told():
    rates = [1e-3, 2e-3, 4e-3]
    assert describe_edge(2e-3, rates) is None
    assert describe_edge(4e-3, rates) == "the best rate, 0.004, is the highest that was tried"
    assert describe_edge(1e-3, rates) == "the best rate, 0.001, is the lowest that was tried"
    assert describe_edge(1e-3, [1e-3]) == "only 1 rate tried"
    assert describe_edge(1e-3, [1e-3, 2e-3]) == "only 2 rates tried"


def test_what_it_took_is_counted_with_and_without_the_start_and_the_evaluations():
    runs = {1e-3: record(5.0, 4.5, 4.2), 2e-3: record(5.0, 4.0, 3.0, step_s=2.0)}
    found = measure_reached(Entry("ours", 30, runs, []), 4.0, 100, interpolate=False)
    assert found is not None
    assert (found.steps, found.tokens, found.seconds) == (20, 2000, 40.0)
    assert found.raw_s == 40.0, "19 steps of 2 s, and the first one as long"
    assert found.wall_s == 50.0 + 19 * 2.0 + 2 * 5.0
    assert measure_reached(Entry("ours", 30, runs, []), 2.9, 100, interpolate=False) is None
    between = measure_reached(Entry("ours", 30, runs, []), 3.5, 100, interpolate=True)
    assert between is not None
    assert (between.steps, between.seconds, between.tokens) == (25, 50.0, 2500)
    assert between.raw_s == 50.0
    assert between.wall_s == 50.0 + 29 * 2.0 + 3 * 5.0, "of the evaluation that saw it"


def test_the_seconds_are_those_of_the_timed_runs_if_there_are_any():
    slow = {1e-3: record(5.0, 4.0, 3.0, step_s=9.0)}
    timed = [record(5.0, 4.0, step_s=2.0), record(5.0, 4.0, step_s=2.0, start_s=20.0)]
    entry = Entry("ours", 30, slow, timed)
    found = measure_reached(entry, 4.0, 100, interpolate=False)
    assert found is not None
    assert (found.steps, found.seconds, found.raw_s) == (20, 40.0, 40.0)
    assert found.wall_s == (98 + 68) / 2
    assert entry.step_times.clean == "34 of 34", "two runs without three of warm-up"


def test_steps_that_waited_for_a_core_do_not_count():
    mixed = record(5.0, 4.0, step_s=1.0)
    mixed.step_s[5] = 30.0
    mixed.waits_s[5] = 20.0
    entry = Entry("ours", 20, {1e-3: mixed}, [])
    assert entry.step_times.clean == "16 of 17"
    found = measure_reached(entry, 4.0, 100, interpolate=False)
    assert found is not None
    assert (found.seconds, found.raw_s) == (20.0, 49.0)


def test_the_curves_are_drawn(tmp_path: Path):
    runs = {1e-3: record(5.0, 4.5), 2e-3: record(5.0, 4.0)}
    draw_curves([Entry("ours", 20, runs, []), Entry("peer", 20, runs, [])], 4.2, tmp_path / "a" / "curves.png")
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
