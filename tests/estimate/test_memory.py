"""Bytes of each part against what they stand for: tensors that autograd keeps, ZeRO's states, checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config, ModelSection
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.engine.optimizer import checkpoint_bytes
from smoltrain.estimate.fitting import RECOMPUTE_MODES
from smoltrain.estimate.memory import (
    _zero_state_bytes,
    activation_bytes,
    attention_activation_bytes,
    block_activation_bytes,
    estimate_memory,
    loss_bytes,
    num_recomputed_blocks,
)
from smoltrain.estimate.training_setup import build_training_setup
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.model.build import build_model
from smoltrain.model.interface import ComputeOptions
from smoltrain.model.layers import DecoderBlock, compute_rotary_angles
from tests import tiny
from tests.engines import loader_of, masked_engine
from tests.estimate.setups import SMOL, make_setup
from tests.estimate.test_orthogonalization import largest_allocation
from tests.sessions import bare_session, train_steps

LLAMA = ("model.hidden_size=64", "model.num_hidden_layers=3", "model.intermediate_size=192")
GPT = (*LLAMA, "model.norm=layernorm", "model.positions=learned", "model.mlp=gelu", "model.attention_bias=true",
       "model.mlp_bias=true", "model.dropout=0.1", "model.num_key_value_heads=4")  # fmt: skip


def kept_bytes(section: ModelSection, kernel: str, dtype: torch.dtype, B: int, T: int) -> int:
    """What autograd keeps of one block, beside its weights and the rotary angles that all blocks share."""
    name: Any = kernel
    first = build_model(section, ComputeOptions(attention=AttentionKernel(name, "")))
    layer: Any = first.get_submodule("layers.0").to(dtype)
    assert isinstance(layer, DecoderBlock)
    rotary = compute_rotary_angles(
        torch.arange(T), section.hidden_size // section.num_attention_heads, section.rope_theta
    )
    shared = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.data_ptr() for x in rotary}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage  # which also keeps the address from being used again
        return tensor

    x_BTD = torch.randn(B, T, section.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x_BTD, rotary if section.positions == "rope" else None, None, None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("words", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["sdpa", "blocked"])
def test_a_block_keeps_what_autograd_keeps(words: tuple[str, ...], precision: str, kernel: str):
    B, T = 2, 256
    settings = load_config("quickstart", [*words, f"engine.precision={precision}", f"batch.sequence_length={T}"])
    computing = ComputeOptions(attention=AttentionKernel(kernel, ""))  # pyright: ignore[reportArgumentType]
    case = build_training_setup(settings, world=1, device="cpu", computing=computing)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert isinstance(settings.model, ModelSection)
    assert B * T * block_activation_bytes(case) == pytest.approx(
        kept_bytes(settings.model, kernel, dtype, B, T), rel=0.01
    )


def test_probabilities_of_long_rows_are_not_kept():
    near, far = (make_setup(length=T, attention="blocked", micro_batch=1) for T in (1024, 1025))
    assert attention_activation_bytes(near) == 2 * near.shape.heads * (1024 + 128) / 2
    assert attention_activation_bytes(far) == 0
    assert attention_activation_bytes(dataclasses.replace(near, attention="math")) > 3 * attention_activation_bytes(
        near
    )


def test_recomputation_keeps_less_the_more_of_it():
    case = make_setup(recipe=SMOL, device="cuda", compiled_blocks=False)
    kept = {mode: activation_bytes(dataclasses.replace(case, recompute=mode))[0] for mode in RECOMPUTE_MODES}
    assert kept["none"] > kept[8] > kept[4] > kept[3] > kept[2] > kept["full"]
    assert kept["full"] < kept["selective"] < kept["none"]
    assert [num_recomputed_blocks(dataclasses.replace(case, recompute=n)) for n in (1, 4, 29, 30, 99)] == [
        30,
        8,
        2,
        1,
        1,
    ]


def test_compiled_blocks_choose_for_themselves():
    case = make_setup(recipe=SMOL, device="cuda", compiled_blocks=True)
    assert activation_bytes(dataclasses.replace(case, recompute="selective")) == activation_bytes(case)
    assert block_activation_bytes(case) < block_activation_bytes(dataclasses.replace(case, compiled_blocks=False))


def test_the_fused_loss_holds_no_logits():
    case = make_setup("batch.sequence_length=2048", "batch.micro_batch=8", recipe=SMOL)
    logits = 2 * 8 * 2048 * 49152
    plain, fused = (max(loss_bytes(dataclasses.replace(case, loss=loss))) for loss in ("plain", "fused"))
    assert plain == 6 * logits
    assert fused < logits / 4
    assert max(loss_bytes(dataclasses.replace(case, loss="recomputed"))) < logits


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_states_are_parted_among_the_ranks(stage: int, device: Any):
    words = ("engine.ds_config=zero3",) if stage == 3 else ("engine.reduce_gradients=micro_batch",)
    one, eight = (
        estimate_memory(
            make_setup(*words, "batch.micro_batch=1", "batch.accumulation=1", recipe=SMOL, device=device, world=W)
        )
        for W in (1, 8)
    )
    N = 134_515_008
    assert (one["optimizer"], eight["optimizer"]) == (12 * N, 12 * N / 8)
    assert (one["gradients"], eight["gradients"]) == (4 * N, 4 * N / 8)
    assert one["weights"] == 2 * N
    assert one.total == pytest.approx(sum(one.parts.values()))


def test_once_a_step_costs_a_whole_gradient_and_spares_the_casts():
    words = ("batch.micro_batch=1", "batch.accumulation=4")
    once = estimate_memory(make_setup(*words, recipe=SMOL, world=8, device="cuda", once_per_step=True))
    each = estimate_memory(make_setup(*words, recipe=SMOL, world=8, device="cuda", once_per_step=False))
    assert once["gradients"] == 8 * each["gradients"]
    assert once["reduction"] == 0 < each["reduction"]


def allocated_by_an_update(settings: Config) -> int:
    """Bytes at the fullest moment of the last of two updates by AdamW as a GPU has it, which torch's fused one is."""
    with pytest.MonkeyPatch.context() as patch:
        engine = masked_engine(settings, "own step", patch, accumulation=1)
        update = engine._steps.update
        fullest: list[int] = []

        def counted(*arguments: Any) -> Any:
            outcomes = []
            fullest.append(largest_allocation(lambda: outcomes.append(update(*arguments))))
            return outcomes[0]

        patch.setattr(engine._steps, "update", counted)
        train_steps(range(1, 3), bare_session(settings, engine, loader_of(settings, 0, 1, 1)))
    return fullest[-1]


def test_an_update_that_is_not_compiled_widens_a_gradient_in_bf16(tmp_path: Path, ranks: Any):
    """That of a lone micro-batch on a lone rank, which is never added up."""
    words = ("engine.precision=bf16", "batch.accumulation=1", "engine.compile=off")
    settings = tiny.load(tmp_path, *words)
    prepare_run_data(settings)
    case = dataclasses.replace(build_training_setup(settings, world=1, device="cpu"), device="cuda")
    assert case.gradient_sum_bytes == 2
    assert not case.compiled_update
    [measured] = ranks(1).run(allocated_by_an_update, settings)
    assert measured == pytest.approx(4 * case.shape.parameters, rel=0.1)
    eager, compiled = (_zero_state_bytes(dataclasses.replace(case, compiled_update=on))[2] for on in (False, True))
    assert eager == 4 * case.shape.parameters
    assert compiled == 0


def test_a_checkpoint_in_the_making_is_a_copy_on_the_host():
    words = ("phases.main.steps=100", "phases.continuation.steps=10", "checkpoint.every=50")
    case = make_setup(*words, recipe=SMOL, world=2)
    assert case.saves_midway
    copy = estimate_memory(case)["checkpoint"]
    whole = checkpoint_bytes(case.optimizer, 0, case.shape.parameters, case.weight_bytes)
    assert copy == whole - 12 * case.shape.parameters / 2, "rank 1 has its own half"
    assert estimate_memory(dataclasses.replace(case, device="cuda"))["checkpoint"] == 0
    assert not make_setup("phases=[{name: main, steps: 9, lr: 1e-3}]", "checkpoint.every=0").saves_midway
