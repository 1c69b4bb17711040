"""Alternatives and disk."""

from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from smoltrain.checkpoint.retention import Validation, steps_to_keep
from smoltrain.config.load import load_config
from smoltrain.estimate.constants import GPUS
from smoltrain.estimate.report import Estimate, estimate_alternatives, max_num_checkpoints, speed_summary
from smoltrain.estimate.training_setup import build_training_setup
from smoltrain.schedule import Plan


def test_zero0_in_bf16_is_not_among_the_alternatives():
    for precision, stages in (("bf16", {1, 2, 3}), ("fp32", {0, 1, 2, 3})):
        settings = load_config("quickstart", [f"engine.precision={precision}"])
        estimate = Estimate(build_training_setup(settings, world=2, device="cuda"), GPUS["l4"])
        assert {stage for stage, _ in estimate_alternatives(estimate, settings)} == stages


@examples(max_examples=15)
@given(
    every=st.integers(0, 9), keep_last=st.integers(1, 4), keep_every=st.integers(0, 12), steps=st.integers(1, 40),
    more=st.integers(1, 9),
)  # fmt: skip
def test_as_many_checkpoints_as_retention_keeps(every: int, keep_last: int, keep_every: int, steps: int, more: int):
    words = [
        f"checkpoint.{key}={value}"
        for key, value in (("every", every), ("keep_last", keep_last), ("keep_every", keep_every))
    ]
    phases = [f"phases.main.steps={steps}", f"phases.continuation.steps={more}", "phases.main.warmup_steps=0"]
    settings = load_config("quickstart", [*words, *phases])
    plan = Plan(settings.phases)
    there: set[int] = set()
    most = 0
    for step in range(1, plan.last_step + 1):
        if plan.is_due(step, every) or plan.ends_phase(step):
            there.add(step)
            most = max(most, len(there))
            there = steps_to_keep(dict.fromkeys(there, Validation(None, 64)), plan, settings.checkpoint)
    assert most <= max_num_checkpoints(plan, settings) <= most + 2


def test_who_waits_for_whom_is_said_of_a_gpu():
    words = ["batch.sequence_length=2048", "batch.micro_batch=16"]
    large, small = (
        " ".join(
            speed_summary(Estimate(build_training_setup(load_config(*recipe), world=1, device="cuda"), GPUS["h100"]))
        )
        for recipe in (("smollm2-135m", words), ("quickstart", []))
    )
    assert "none was measured" in large
    assert "the step does not wait for it" in large
    assert "the step waits for it: take a larger batch.micro_batch" in small
