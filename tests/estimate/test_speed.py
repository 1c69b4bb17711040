"""Seconds and operations against published ones and the formulas."""

import dataclasses

import pytest

from smoltrain.estimate.constants import GPUS
from smoltrain.estimate.speed import attention_operations, estimate_speed, matmul_operations, model_flops_utilization
from tests.estimate.setups import SMOL, make_setup, sent_bytes_per_step


def test_mfu_is_that_of_llm_foundry():
    """142,830 tokens/s on each of 8 A100s are 44.8 % for MPT-125M at T 2048 (its published table)."""
    shape = dataclasses.replace(make_setup().shape, parameters=125_311_488, layers=12, width=768)
    case = make_setup(shape=shape, length=2048, world=8)
    assert model_flops_utilization(case, 8 * 142_830, 312e12) == pytest.approx(0.448, abs=0.003)


def test_operations_are_those_of_the_formula():
    case = make_setup(recipe=SMOL, device="cuda")
    N, n = case.shape.parameters, case.micro_batch_tokens
    assert matmul_operations(case, 0) == 6 * n * case.shape.matmul_parameters == 6 * n * N
    assert matmul_operations(case, 1) - matmul_operations(case, 0) == 2 * n * (N - 49152 * 576)
    causal = 12 * case.shape.layers * case.shape.width * case.length / 2
    assert attention_operations(dataclasses.replace(case, attention="math"), 0) == n * causal


def test_more_work_takes_longer():
    device = GPUS["h100"]
    words = ("batch.sequence_length=2048", "batch.micro_batch=8", "batch.accumulation=4")
    none, full = (
        estimate_speed(make_setup(*words, recipe=SMOL, world=8, device="cuda", recompute=mode), device)
        for mode in ("none", "full")
    )
    assert none.step_s < full.step_s < 4 / 3 * none.step_s
    assert none.mfu > full.mfu
    assert 0.1 < none.mfu < 0.7
    assert estimate_speed(make_setup(*words, recipe=SMOL, world=1, device="cuda"), device).parts["reduction"] == 0
    stages = [make_setup(*words, recipe=SMOL, world=8, device="cuda").with_zero_stage(stage) for stage in (2, 1, 3)]
    sent = [sent_bytes_per_step(case) for case in stages]
    assert sent == sorted(sent), "ZeRO-1 in bf16 is DeepSpeed's, which all-reduces; ZeRO-2 reduces once a step"
