"""The plan: bounds, shapes, and parity with the schedulers of torch and transformers."""

import math
from fractions import Fraction
from itertools import pairwise
from random import Random
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from smoltrain.config.schema import MAX_INT, MAX_TOKENS, PhaseSection
from smoltrain.errors import UserError
from smoltrain.schedule import SCHEDULES, Plan, count_planned_steps, describe_completion, resolve_horizons, scheduled_lr


def rates(plan: Plan) -> list[float]:
    return [plan.lr(step) for step in range(1, plan.last_step + 1)]


def walked(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    """The learning rate that torch would use at each step."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def sgd(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_what_is_complete_is_a_phase_or_the_plan():
    phases = (PhaseSection(name="main", steps=8, lr=1e-3), PhaseSection(name="end", steps=4, schedule="continue"))
    plan = Plan(phases)
    assert describe_completion(plan, 8) == "phase main is complete (step 8 of 12)"
    assert describe_completion(plan, 8, until=8) == "phase main is complete (step 8 of 12)"
    beyond = "phase main is complete (step 8 of 12), and the run is at step 9"
    assert describe_completion(plan, 9, until=8) == beyond, "phase end is not"
    assert describe_completion(plan, 12, until=8) == "the plan is complete (12 steps)"


def test_a_plan_is_made_of_steps_alone():
    for horizon in ({"tokens": 400}, {"epochs": 1.0}, {}):
        with pytest.raises(ValueError, match="phase p has no steps: resolve_horizons comes first"):
            Plan((PhaseSection.model_validate({"name": "p", "lr": 1e-3} | horizon),))


def test_every_schedule_of_the_schema_has_its_function():
    names = get_args(PhaseSection.model_fields["schedule"].annotation)
    assert set(SCHEDULES) == set(names) - {"continue"}


# --- parity


@pytest.mark.parametrize(
    ("schedule", "final"), [("constant", 0.0), ("linear", 0.0), ("linear", 1e-4), ("cosine", 0.0), ("cosine", 1e-4)]
)
@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_parity_with_torch(schedule: Any, warmup: int, final: float):
    """Exact where torch has the shape: LinearLR from lr/warmup, then one of three, in a SequentialLR."""
    steps, lr = 50, 1e-3
    phase = PhaseSection(name="p", steps=steps, lr=lr, schedule=schedule, warmup_steps=warmup, final_lr=final)
    optimizer, left = sgd(lr), steps - warmup
    after = {
        "constant": lambda: LinearLR(optimizer, 1.0, 1.0, left),
        "linear": lambda: LinearLR(optimizer, 1.0, final / lr, left),
        "cosine": lambda: CosineAnnealingLR(optimizer, left, final),
    }[schedule]
    if warmup:
        rise = LinearLR(optimizer, 1 / warmup, 1.0, max(1, warmup - 1))
        scheduler = SequentialLR(optimizer, [rise, after()], [warmup])
    else:
        scheduler = after()
    assert rates(Plan((phase,))) == pytest.approx(walked(optimizer, scheduler, steps), rel=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_parity_with_transformers_after_the_warm_up(schedule: Any, warmup: int):
    """transformers warms up from 0, so its first step learns nothing; its warm-up is ours one step later."""
    from transformers import optimization

    steps, decay, optimizer = 50, 20, sgd(1e-3)
    scheduler = {
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps),
        "wsd": lambda: optimization.get_wsd_schedule(
            optimizer, warmup, decay, num_training_steps=steps, decay_type="linear"
        ),
    }[schedule]()
    decay_steps = decay if schedule == "wsd" else 0
    phase = PhaseSection(
        name="p", steps=steps, lr=1e-3, schedule=schedule, warmup_steps=warmup, decay_steps=decay_steps
    )
    ours, theirs = rates(Plan((phase,))), walked(optimizer, scheduler, steps)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-9)
    assert ours[: warmup - 1 if warmup else 0] == pytest.approx(theirs[1:warmup], rel=1e-9)
    assert warmup == 0 or theirs[0] == 0 < ours[0]


def test_wsd_rises_stays_and_falls():
    phase = PhaseSection(name="p", steps=10, lr=1.0, schedule="wsd", warmup_steps=2, decay_steps=4, final_lr=0.2)
    assert rates(Plan((phase,))) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


# --- properties


@st.composite
def phases(draw: st.DrawFn, schedules: tuple[Any, ...] = ("constant", "linear", "cosine", "wsd")) -> PhaseSection:
    schedule = draw(st.sampled_from(schedules))
    steps = draw(st.integers(1, 60))
    if schedule == "continue":
        return PhaseSection(name="p", steps=steps, schedule="continue")
    warmup = draw(st.integers(0, steps - 1))
    lr = draw(st.floats(1e-6, 1.0))
    falls = schedule != "constant"
    return PhaseSection(
        name="p",
        steps=steps,
        lr=lr,
        schedule=schedule,
        warmup_steps=warmup,
        decay_steps=draw(st.integers(1, steps - warmup)) if schedule == "wsd" else 0,
        final_lr=lr * draw(st.floats(0, 1)) if falls else 0.0,
        weight_decay=draw(st.floats(0, 1)),
        optimizer_state=draw(st.sampled_from(["keep", "reset"])),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    later = st.lists(phases(("constant", "linear", "cosine", "wsd", "continue")), max_size=4)
    every = [draw(phases()), *draw(later)]
    return Plan(tuple(p.model_copy(update={"name": f"p{i}"}) for i, p in enumerate(every)))


@given(phases())
def test_the_rate_stays_between_its_ends_and_never_jumps(phase: PhaseSection):
    assert phase.lr is not None
    lrs = [scheduled_lr(phase, done) for done in range(phase.num_steps)]
    rise, fall = lrs[: phase.warmup_steps], lrs[phase.warmup_steps :]
    close = phase.lr * 1e-9
    assert rise == sorted(rise)
    assert fall[0] == pytest.approx(phase.lr)
    assert all(0 < lr <= phase.lr + close for lr in lrs), "every step learns, the first one too"
    assert all(phase.final_lr - close <= lr for lr in fall)
    assert all(after <= before + close for before, after in pairwise(fall))
    longest = phase.decay_steps or len(fall)
    steepest = max((phase.lr - phase.final_lr) * math.pi / 2 / longest, phase.lr / max(1, phase.warmup_steps))
    assert all(abs(b - a) <= steepest + close for a, b in pairwise(lrs))


@given(plans(), st.randoms())
def test_a_plan_is_a_pure_function_of_the_step(plan: Plan, random: Random):
    steps = list(range(1, plan.last_step + 1))
    in_order = [(plan.lr(n), plan.weight_decay(n), plan.resets_optimizer(n), plan.ends_phase(n)) for n in steps]
    random.shuffle(steps)
    fresh = Plan(tuple(phase.spec for phase in plan.phases))
    for n in steps:
        assert in_order[n - 1] == (fresh.lr(n), fresh.weight_decay(n), fresh.resets_optimizer(n), fresh.ends_phase(n))


@given(plans())
def test_phases_tile_the_steps(plan: Plan):
    assert plan.phases[0].first == 1
    assert plan.phases[-1].last == plan.last_step
    assert all(after.first == before.last + 1 for before, after in pairwise(plan.phases))
    for phase in plan.phases:
        assert phase.last - phase.first + 1 == phase.spec.steps
        assert plan.phase(phase.first) is plan.phase(phase.last) is plan.named(phase.name) is phase
        inside = range(phase.first, phase.last + 1)
        assert [n for n in inside if plan.ends_phase(n)] == [phase.last]
        resets = [phase.first] if phase.spec.optimizer_state == "reset" else []
        assert [n for n in inside if plan.resets_optimizer(n)] == resets
        assert {plan.weight_decay(n) for n in inside} == {phase.spec.weight_decay}


@given(plans(), st.integers(0, 70))
def test_due_is_every_nth_step_and_every_end(plan: Plan, every: int):
    ends = {phase.last for phase in plan.phases}
    steps = range(1, plan.last_step + 1)
    expected = [n for n in steps if n % every == 0 or n in ends] if every else []
    assert [n for n in steps if plan.is_due(n, every)] == expected


@given(plans())
def test_a_longer_plan_does_not_change_its_past(plan: Plan):
    specs = tuple(phase.spec for phase in plan.phases)
    longer = Plan((*specs, PhaseSection(name="more", steps=5, lr=1e-4)))
    assert rates(longer)[: plan.last_step] == rates(plan)


# --- phase after phase


@pytest.mark.parametrize("step", [-1, 0, 31])
def test_no_step_outside_the_plan(step: int):
    plan = Plan((PhaseSection(name="p", steps=30, lr=1e-3),))
    with pytest.raises(ValueError, match="outside the plan's"):
        plan.lr(step)


def test_continue_holds_the_last_rate_however_often():
    main = PhaseSection(name="main", steps=10, lr=1.0, schedule="linear", final_lr=0.5, weight_decay=0.1)
    more = PhaseSection(name="more", steps=5, schedule="continue", weight_decay=0.3)
    plan = Plan((main, more, more.model_copy(update={"name": "again"})))
    assert rates(plan)[10:] == [plan.lr(10)] * 10
    assert plan.weight_decay(11) == 0.3


def test_a_continuation_has_the_rate_that_was_asked_for():
    """recipes.md, note 2: an original asked for 1e-4 after a cosine to 0, and the restored schedule gave 2.84e-07."""
    main = PhaseSection(name="main", steps=5000, lr=3e-4, schedule="cosine", weight_decay=0.01)
    plan = Plan((main, PhaseSection(name="continuation", steps=50, lr=1e-4, weight_decay=0.02)))
    assert plan.lr(4903) == pytest.approx(2.84e-07, rel=0.01)  # where that log went on from
    assert plan.lr(5000) < 1e-10
    assert plan.ends_phase(5000)
    assert {plan.lr(step) for step in range(5001, 5051)} == {1e-4}
    assert (plan.weight_decay(5000), plan.weight_decay(5001)) == (0.01, 0.02)
    assert not plan.resets_optimizer(5001)


# --- phases in tokens and epochs


def phase_of(**fields: Any) -> PhaseSection:
    return PhaseSection(**{"name": "p", "lr": 1e-3} | fields)


@pytest.mark.parametrize(
    ("horizon", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1}, 1),
        ({"tokens": 2048}, 1),
        ({"tokens": 2049}, 2),
        ({"tokens": "400M"}, 195_313),  # 400,000,000 / 2048 = 195,312.5
        ({"tokens": "3.2e9"}, 1_562_500),
        ({"epochs": 1}, 25),  # 51,200 / 2048
        ({"epochs": 0.5}, 13),
        ({"epochs": 3}, 75),
        ({"epochs": 1.1}, 28),  # 56,320 / 2048 = 27.5
    ],
)
def test_a_phase_in_tokens_or_epochs_is_so_many_steps(horizon: dict[str, Any], steps: int):
    """Counted by hand, for steps of 16 rows of 128 targets over 400 rows."""
    (found,) = resolve_horizons((phase_of(**horizon),), 16 * 128, 400 * 128)
    assert found == phase_of(steps=steps)


def test_an_epoch_is_exact():
    """0.07 times 100 is a little more than 7 as floats, which would be another step."""
    assert 0.07 * 100 > 7
    (found,) = resolve_horizons((phase_of(epochs=0.07),), 7, 100)
    assert found.steps == 1


HORIZONS = st.one_of(
    st.builds(dict, steps=st.integers(1, 10**6)),
    st.builds(dict, tokens=st.integers(1, 10**12)),
    st.builds(dict, epochs=st.floats(1e-3, 1e3)),
)


@given(st.lists(HORIZONS, min_size=1, max_size=4), st.integers(1, 10**7), st.integers(1, 10**9))
def test_the_fewest_steps_that_train_at_least_what_was_asked(asked: list[dict[str, Any]], per_step: int, epoch: int):
    phases = tuple(phase_of(name=f"p{i}", **horizon) for i, horizon in enumerate(asked))
    if any(Fraction(str(h["epochs"])) * epoch > MAX_INT * per_step for h in asked if "epochs" in h) or any(
        h["tokens"] > MAX_INT * per_step for h in asked if "tokens" in h
    ):
        return
    found = resolve_horizons(phases, per_step, epoch)
    assert resolve_horizons(found, 1, None) == found, "what is resolved stays as it is, whoever looks at it"
    assert count_planned_steps(found) == Plan(found).last_step
    for phase, horizon in zip(found, asked, strict=True):
        tokens = phase.num_steps * per_step
        want = horizon.get("tokens", Fraction(str(horizon.get("epochs", 0))) * epoch)
        assert tokens >= want
        assert "steps" in horizon or tokens - per_step < want
        assert phase.horizon == {"steps": phase.steps}


@given(st.integers(1, MAX_TOKENS), st.integers(1, 10**6))
def test_more_tokens_are_never_fewer_steps(tokens: int, per_step: int):
    if tokens + per_step > MAX_INT * per_step:
        return
    one, more = resolve_horizons(
        (phase_of(tokens=tokens), phase_of(tokens=min(MAX_TOKENS, tokens + per_step))), per_step, None
    )
    assert more.num_steps - one.num_steps in (0, 1)


def test_what_the_steps_are_too_few_or_too_many_for_is_refused_with_their_number():
    phases = (
        phase_of(name="a", tokens=4096, warmup_steps=3),
        phase_of(name="b", epochs=2, schedule="wsd", warmup_steps=1, decay_steps=4),
        phase_of(name="c", tokens=MAX_TOKENS),
        phase_of(name="d", steps=1, warmup_steps=9),  # rules.py says so
    )
    with pytest.raises(UserError) as caught:
        resolve_horizons(phases, 2048, 4096)
    assert [str(problem) for problem in caught.value.problems] == [
        "phases.a is shorter than its warm-up and decay: saw 3 + 0, want at most the 2 steps that tokens=4,096 are; "
        "change phases.a.tokens",
        "phases.b is shorter than its warm-up and decay: saw 1 + 4, want at most the 4 steps that epochs=2.0 are; "
        "change phases.b.epochs",
        "phases.c would be too long: saw tokens=1,000,000,000,000,000, 488,281,250,000 steps, want at most "
        "2,147,483,647; change phases.c.tokens",
    ]
    assert count_planned_steps(phases) is None
