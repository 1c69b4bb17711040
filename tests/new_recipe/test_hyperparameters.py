"""Batch, rate and steps: pure functions that keep to their rules for any size, text and number of ranks."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from smoltrain.data.order import largest_num_streams
from smoltrain.errors import UserError
from smoltrain.new_recipe import hyperparameters as rules
from smoltrain.new_recipe.hyperparameters import (
    BatchPlan,
    choose_cadences,
    choose_final_rate,
    choose_learning_rate,
    choose_warmup,
    optimal_num_tokens,
    plan_batch,
    step_law_batch,
)

TOKENS = st.floats(5, 13).map(lambda power: int(10**power))
SIZES = st.floats(6, 10).map(lambda power: int(10**power))


def test_step_law_is_as_published():
    """1B parameters on 100B tokens, and 400M on 40B: the two settings that its authors show whole."""
    for N, D, rate, batch in ((1e9, 1e11, 1.65e-3, 1.10e6), (4e8, 4e10, 2.4e-3, 0.65e6)):
        assert step_law_batch(D) == pytest.approx(0.58 * D**0.571)
        assert step_law_batch(D) == pytest.approx(batch, rel=0.02)
        assert choose_learning_rate(int(N), D) == pytest.approx(rate, rel=0.05)


def test_a_plan_is_compute_optimal_unless_the_text_is_short():
    assert optimal_num_tokens(20_000_000, 1e12) == 400_000_000
    assert optimal_num_tokens(20_000_000, 1e6) == 4_000_000


@hypothesis.given(SIZES, SIZES, TOKENS)
def test_the_rate_falls_with_the_size(one: int, other: int, tokens: int):
    smaller, larger = sorted((one, other))
    assert rules.HIGHEST_RATE >= choose_learning_rate(smaller, tokens) >= choose_learning_rate(larger, tokens) > 0


def test_the_rate_ends_where_step_laws_runs_end_or_at_a_tenth_of_a_low_peak():
    assert [choose_final_rate(peak) for peak in (3e-3, 1e-4, 2e-5)] == [1e-5, 1e-5, 2e-6]


@hypothesis.given(SIZES, TOKENS, st.floats(6, 13).map(lambda power: 10**power), st.integers(1, 64))
def test_any_number_of_ranks_shares_a_step(params: int, tokens: int, text_tokens: float, world: int):
    hypothesis.assume(min(tokens, text_tokens) >= 2 * 32 * world)
    batch = plan_batch(params, tokens, text_tokens, world)
    assert batch.rows_per_step % math.lcm(world, 2) == 0
    assert largest_num_streams(batch.rows_per_step, world) % world == 0
    assert batch.step_tokens < text_tokens
    assert batch.tokens == pytest.approx(tokens, abs=batch.step_tokens / 2)
    assert 32 <= batch.sequence_length <= 2048
    wanted = min(step_law_batch(tokens), text_tokens / rules.LEAST_STEPS_PER_EPOCH)
    if wanted >= 2 * world * 8 * 32:
        assert wanted / 2 <= batch.step_tokens <= 2 * wanted


def test_rows_get_longer_with_the_model():
    lengths = [
        plan_batch(params, 10**10, 1e12, 1).sequence_length
        for params in (2_000_000, 20_000_000, 70_000_000, 200_000_000)
    ]
    assert lengths == [256, 512, 1024, 2048]


def test_a_short_plan_has_few_rows_and_a_short_text_short_ones():
    assert plan_batch(20_000_000, 50_000, 1e6, 2) == BatchPlan(128, 2, 195)
    assert plan_batch(20_000_000, 50_000, 500, 2).sequence_length == 32


def test_a_text_that_is_too_short_for_the_ranks_is_refused():
    with pytest.raises(UserError, match="the text is too short to train on: saw about 1,000 tokens, want at least"):
        plan_batch(2_000_000, 4000, 1000, 64)
    with pytest.raises(UserError, match="the plan is too short for a step: saw 100 tokens"):
        plan_batch(2_000_000, 100, 1e9, 8)


def test_the_warmup_is_what_adam_needs_or_a_hundredth_or_a_tenth():
    assert [choose_warmup(steps) for steps in (5, 100, 1000, 10_000, 10**6)] == [0, 10, 40, 100, 2000]


@hypothesis.given(st.integers(1, 10**6), st.integers(1, 2**20), st.floats(1, 1e6))
def test_cadences_are_round_and_fit_the_plan(steps: int, rows: int, held_out_rows: float):
    cadences = choose_cadences(BatchPlan(256, rows, steps), held_out_rows)
    for every in (cadences.evaluate, cadences.sample, cadences.checkpoint, cadences.print):
        assert 1 <= every <= steps
        assert str(every).strip("0") in ("1", "2", "5")
    assert cadences.checkpoint <= 1000
    if steps >= rules.NUM_EVALUATIONS:
        assert 0.6 * rules.NUM_EVALUATIONS <= steps / cadences.evaluate <= 1.6 * rules.NUM_EVALUATIONS
    assert 1 <= cadences.evaluate_rows <= max(1, held_out_rows)
    evaluated = cadences.evaluate_rows * (steps // cadences.evaluate) / 3
    assert evaluated <= max(0.06 * steps * rows, 8 * steps // cadences.evaluate), "a few per cent of the time"
