"""What is chosen so that a run fits."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.estimate.constants import BUSY_TOKENS
from smoltrain.estimate.fitting import (
    RECOMPUTE_MODES,
    build_fitted_setup,
    choose_micro_batch,
    find_least_recomputation,
    fit_config_to_memory,
    fits_memory,
)
from smoltrain.estimate.memory import estimate_memory
from smoltrain.estimate.training_setup import build_training_setup
from tests.estimate.setups import SMOL


def least(words: tuple[str, ...], gib: float, **more: Any) -> Any:
    return find_least_recomputation(load_config(SMOL, list(words)), gib * 2**30, 8, device="cuda", **more)


def test_the_least_recomputation_that_fits():
    words = ("batch.sequence_length=2048", "batch.micro_batch=8", "batch.accumulation=1", "engine.compile=off")
    chosen = [least(words, gib) for gib in (40, 14, 12, 10, 8, 6, 1)]
    order = [RECOMPUTE_MODES.index(mode) for mode in chosen]
    assert order == sorted(order)
    assert (chosen[0], chosen[-1]) == ("none", "full")
    assert len(set(chosen)) >= 4
    settings = load_config(SMOL, list(words))
    for gib, mode in ((12, chosen[2]), (8, chosen[4])):
        case = dataclasses.replace(build_training_setup(settings, world=8, device="cuda"), recompute=mode)
        assert fits_memory(case, gib * 2**30)
        before = RECOMPUTE_MODES[RECOMPUTE_MODES.index(mode) - 1]
        assert not fits_memory(dataclasses.replace(case, recompute=before), gib * 2**30)


def test_a_model_of_transformers_recomputes_all_or_nothing():
    words = ["model={kind: transformers, model_type: gpt2, vocab_size: 2048, max_position_embeddings: 128}"]
    settings = load_config("quickstart", [*words, "engine.gradient_checkpointing=none", "batch.micro_batch=512"])
    assert find_least_recomputation(settings, 80e9, 1, device="cuda") == "none"
    assert find_least_recomputation(settings, 8e9, 1, device="cuda") == "full"


def split(rows: int, *words: str) -> Config:
    """SmolLM2-135M, so many rows a step, split by the machine."""
    said = ["batch.accumulation=null", f"batch.rows_per_step={rows}", "batch.micro_batch=auto", *words]
    return load_config(SMOL, said)


@examples(max_examples=15)
@given(rows=st.integers(1, 64), length=st.sampled_from([64, 2048]), gib=st.floats(0.1, 64))
def test_a_chosen_micro_batch_divides_and_fits_and_keeps_the_device_busy(rows: int, length: int, gib: float):
    settings = split(2 * rows, f"batch.sequence_length={length}")
    n = choose_micro_batch(settings, gib * 2**30, 2, device="cuda")
    case = build_training_setup(settings, world=2, device="cuda")
    ways = {m: case.with_micro_batch(m) for m in range(1, rows + 1) if rows % m == 0}
    possible = [m for m, way in ways.items() if way and fits_memory(way, gib * 2**30)]
    busy = [m for m in possible if m * length >= BUSY_TOKENS["cuda"]]
    assert n == (busy[0] if busy else possible[-1] if possible else 1)


@pytest.mark.parametrize(("gib", "rows", "recompute"), [(64, 16, "none"), (8, 4, "none"), (2.5, 1, "full")])
def test_what_is_auto_is_settled_together(gib: float, rows: int, recompute: str):
    settings = split(64, "engine.gradient_checkpointing=auto", "batch.sequence_length=2048", "engine.compile=off")
    settled = fit_config_to_memory(settings, gib * 2**30, 2, device="cuda")
    assert (settled.batch.micro_batch, settled.engine.gradient_checkpointing) == (rows, recompute)
    assert fit_config_to_memory(settled, 1, 2, device="cuda") == settled, "what a recipe says is left alone"


def test_on_a_gpu_gradients_are_reduced_once_a_step_where_their_sums_fit():
    """On 64 ranks, of which each holds 1/64 of the gradients otherwise. A lone micro-batch on one rank needs none."""
    words = ["batch.micro_batch=1", "batch.accumulation=2", "model.num_hidden_layers=300"]
    N = build_training_setup(load_config(SMOL, words), world=64, device="cuda").shape.parameters
    chosen = {}
    for gib in (11.0, 10.0):
        setup = build_fitted_setup(load_config(SMOL, words), gib * 2**30, 64, device="cuda")
        chosen[setup.once_per_step] = estimate_memory(setup)
        assert fits_memory(setup, gib * 2**30)
    assert chosen[True]["gradients"] == 4 * N
    assert chosen[False]["gradients"] == 4 * N / 64
    lone = ["batch.micro_batch=1", "batch.accumulation=1"]
    setup = build_fitted_setup(load_config(SMOL, lone), 80 * 2**30, 1, device="cuda")
    assert (setup.once_per_step, setup.gradient_sum_bytes) == (True, 2)
