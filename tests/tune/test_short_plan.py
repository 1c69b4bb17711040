"""A phase over other steps has the shape that it had."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.config.schema import PhaseSection
from smoltrain.errors import UserError
from smoltrain.schedule import scheduled_lr
from smoltrain.tune.short_plan import describe_short_plan, is_much_shorter, scale_phase


def phase(**values: object) -> PhaseSection:
    return PhaseSection.model_validate({"name": "main", "steps": 160, "lr": 2e-3, **values})


@pytest.mark.parametrize(
    ("warmup", "decay", "steps", "expected"),
    [
        (20, 0, 30, (4, 0)),  # 3.75
        (20, 0, 40, (5, 0)),
        (20, 0, 160, (20, 0)),
        (20, 0, 320, (40, 0)),
        (1, 0, 10, (1, 0)),  # never to nothing
        (0, 0, 10, (0, 0)),
        (16, 32, 40, (4, 8)),
        (1, 1, 2, (1, 1)),
    ],
)
def test_warm_up_and_decay_keep_their_share(warmup: int, decay: int, steps: int, expected: tuple[int, int]):
    schedule = "wsd" if decay else "cosine"
    short = scale_phase(phase(warmup_steps=warmup, decay_steps=decay, schedule=schedule), steps)
    assert (short.warmup_steps, short.decay_steps) == expected
    assert (short.steps, short.lr, short.schedule) == (steps, 2e-3, schedule)


def test_too_few_steps_for_both_are_refused():
    with pytest.raises(UserError, match="--steps is too short for the schedule: saw 1, of them 1 of warm-up and 1 of"):
        scale_phase(phase(warmup_steps=1, decay_steps=1, schedule="wsd"), 1)


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(0, 100), st.integers(1, 2000))
def test_at_the_same_share_of_the_way_the_rate_is_the_same(schedule: str, warmup: int, scale: int):
    """At whole multiples exactly; the schedules are functions of the share alone."""
    final_lr = 0.0 if schedule == "constant" else 2e-4
    original = phase(schedule=schedule, warmup_steps=warmup, final_lr=final_lr)
    long = scale_phase(original, 160 * scale)
    for done in range(warmup, 160, 7):
        assert scheduled_lr(long, done * scale) == pytest.approx(scheduled_lr(original, done), rel=1e-9)
    if warmup:
        assert scheduled_lr(long, warmup * scale - 1) == pytest.approx(scheduled_lr(original, warmup - 1))


def test_what_is_trained_in_words():
    original = phase(warmup_steps=20, schedule="cosine")
    short = scale_phase(original, 30)
    assert describe_short_plan(original, short, ("continuation",)) == (
        "30 steps of phase main, 4 of warm-up (the recipe: 160 steps, 20 of warm-up); without continuation"
    )
    assert describe_short_plan(original, original, ()) == "160 steps of phase main, 20 of warm-up"
    wsd = phase(warmup_steps=16, decay_steps=32, schedule="wsd")
    assert describe_short_plan(wsd, scale_phase(wsd, 40), ()) == (
        "40 steps of phase main, 4 of warm-up and 8 of decay (the recipe: 160 steps, 16 of warm-up, 32 of decay)"
    )


def test_what_counts_as_much_shorter():
    assert is_much_shorter(30, 210)
    assert not is_much_shorter(105, 210)
    assert not is_much_shorter(30, None)
