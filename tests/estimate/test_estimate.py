"""Each number of the estimate against what it stands for: tensors that autograd keeps, checkpoints, published MFU."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from smoltrain.checkpoint.retention import steps_to_keep
from smoltrain.cli import main
from smoltrain.config.load import load_config
from smoltrain.config.schema import Config, ModelSection
from smoltrain.errors import UserError
from smoltrain.estimate.case import TrainingSetup, build_training_setup
from smoltrain.estimate.devices import GPUS
from smoltrain.estimate.fitting import (
    BUSY_TOKENS,
    RECOMPUTE_MODES,
    choose_micro_batch,
    find_least_recomputation,
    fit_config_to_memory,
    fits_memory,
)
from smoltrain.estimate.measure import summarize_run_metrics
from smoltrain.estimate.memory import (
    activation_bytes,
    attention_activation_bytes,
    block_activation_bytes,
    estimate_memory,
    loss_bytes,
    num_recomputed_blocks,
)
from smoltrain.estimate.report import (
    PART_LABELS,
    build_estimate,
    estimate_alternatives,
    estimated_checkpoint_bytes,
    max_num_checkpoints,
)
from smoltrain.estimate.speed import (
    CUDA_EFFICIENCY,
    attention_operations,
    correct_efficiency,
    estimate_speed,
    matmul_operations,
    model_flops_utilization,
    reduction_bytes,
)
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.loss import LossKernel
from smoltrain.model.build import build_model
from smoltrain.model.interface import ComputeOptions
from smoltrain.model.layers import DecoderBlock, compute_rotary_angles
from smoltrain.schedule import Plan
from tests import tiny

LLAMA = ("model.hidden_size=64", "model.num_hidden_layers=3", "model.intermediate_size=192")
GPT = (*LLAMA, "model.norm=layernorm", "model.positions=learned", "model.mlp=gelu", "model.attention_bias=true",
       "model.mlp_bias=true", "model.dropout=0.1", "model.num_key_value_heads=4")  # fmt: skip
SMOL = "smollm2-135m"


def a_case(
    *words: str, recipe: str = "quickstart", world: int = 1, device: Any = "cpu", **changes: Any
) -> TrainingSetup:
    case = build_training_setup(load_config(recipe, list(words)), world=world, device=device)
    return dataclasses.replace(case, **changes)


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
    near, far = (a_case(length=T, attention="blocked", micro_batch=1) for T in (1024, 1025))
    assert attention_activation_bytes(near) == 2 * near.shape.heads * (1024 + 128) / 2
    assert attention_activation_bytes(far) == 0
    assert attention_activation_bytes(dataclasses.replace(near, attention="math")) > 3 * attention_activation_bytes(
        near
    )


def test_recomputation_keeps_less_the_more_of_it():
    case = a_case(recipe=SMOL, device="cuda", compiled_blocks=False)
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
    case = a_case(recipe=SMOL, device="cuda", compiled_blocks=True)
    assert activation_bytes(dataclasses.replace(case, recompute="selective")) == activation_bytes(case)
    assert block_activation_bytes(case) < block_activation_bytes(dataclasses.replace(case, compiled_blocks=False))


def test_the_fused_loss_holds_no_logits():
    case = a_case("batch.sequence_length=2048", "batch.micro_batch=8", recipe=SMOL)
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
            a_case(*words, "batch.micro_batch=1", "batch.accumulation=1", recipe=SMOL, device=device, world=W)
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
    once = estimate_memory(a_case(*words, recipe=SMOL, world=8, device="cuda", once_a_step=True))
    each = estimate_memory(a_case(*words, recipe=SMOL, world=8, device="cuda", once_a_step=False))
    assert once["gradients"] == 8 * each["gradients"]
    assert once["reduction"] == 0 < each["reduction"]


def test_a_checkpoint_in_the_making_is_a_copy_on_the_host():
    words = ("phases.main.steps=100", "phases.continuation.steps=10", "checkpoint.every=50")
    case = a_case(*words, recipe=SMOL, world=2)
    assert case.saves
    copy = estimate_memory(case)["checkpoint"]
    assert copy == estimated_checkpoint_bytes(case) - 12 * case.shape.parameters / 2, "rank 1 has its own half"
    assert estimate_memory(dataclasses.replace(case, device="cuda"))["checkpoint"] == 0
    assert not a_case("phases=[{name: main, steps: 9, lr: 1e-3}]", "checkpoint.every=0").saves


def test_zero0_in_bf16_is_not_among_the_alternatives():
    for precision, stages in (("bf16", {1, 2, 3}), ("fp32", {0, 1, 2, 3})):
        settings = load_config("quickstart", [f"engine.precision={precision}"])
        one = build_estimate(build_training_setup(settings, world=2, device="cuda"), GPUS["l4"])
        assert {stage for stage, _ in estimate_alternatives(one, settings, None, None)} == stages


# ---- what to choose


def least(words: tuple[str, ...], gib: float, **more: Any) -> Any:
    return find_least_recomputation(load_config(SMOL, list(words)), gib * 2**30, 8, device="cuda", **more)


def test_the_least_recomputation_that_fits():
    words = ("batch.sequence_length=2048", "batch.micro_batch=8", "engine.compile=off")
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
    ways = {m: case.split(m) for m in range(1, rows + 1) if rows % m == 0}
    possible = [m for m, way in ways.items() if way and fits_memory(way, gib * 2**30)]
    busy = [m for m in possible if m * length >= BUSY_TOKENS["cuda"]]
    assert n == (busy[0] if busy else possible[-1] if possible else 1)


@pytest.mark.parametrize(("gib", "rows", "recompute"), [(64, 16, "none"), (8, 2, "none"), (2.5, 1, "full")])
def test_what_is_auto_is_settled_together(gib: float, rows: int, recompute: str):
    settings = split(64, "engine.gradient_checkpointing=auto", "batch.sequence_length=2048", "engine.compile=off")
    settled = fit_config_to_memory(settings, gib * 2**30, 2, device="cuda")
    assert (settled.batch.micro_batch, settled.engine.gradient_checkpointing) == (rows, recompute)
    assert fit_config_to_memory(settled, 1, 2, device="cuda") == settled, "what a recipe says is left alone"


def test_a_run_hands_over_what_it_has_settled():
    settings = load_config("quickstart")
    computing = ComputeOptions(attention=AttentionKernel("math", ""), loss=LossKernel("plain", ""), compiles=True)
    case = build_training_setup(
        settings, world=2, device="cpu", rows_per_step=24, precision="fp32", computing=computing
    )
    assert (case.attention, case.loss, case.precision, case.compiled_blocks) == ("math", "plain", "fp32", True)
    assert case.accumulation == 24 // (settings.batch.micro_batch_rows * 2)
    with pytest.raises(UserError, match="do not divide"):
        build_training_setup(settings, world=2, device="cpu", rows_per_step=25)


# ---- time


def test_mfu_is_that_of_llm_foundry():
    """142,830 tokens/s on each of 8 A100s are 44.8 % for MPT-125M at T 2048 (its published table)."""
    shape = dataclasses.replace(a_case().shape, parameters=125_311_488, layers=12, width=768)
    case = a_case(shape=shape, length=2048, world=8)
    assert model_flops_utilization(case, 8 * 142_830, 312e12) == pytest.approx(0.448, abs=0.003)


def test_operations_are_those_of_the_formula():
    case = a_case(recipe=SMOL, device="cuda")
    N, n = case.shape.parameters, case.tokens
    assert matmul_operations(case, 0) == 6 * n * case.shape.matmul_parameters == 6 * n * N
    assert matmul_operations(case, 1) - matmul_operations(case, 0) == 2 * n * (N - 49152 * 576)
    causal = 12 * case.shape.layers * case.shape.width * case.length / 2
    assert attention_operations(dataclasses.replace(case, attention="math"), 0) == n * causal


def test_more_work_takes_longer():
    device = GPUS["h100"]
    words = ("batch.sequence_length=2048", "batch.micro_batch=8", "batch.accumulation=4")
    none, full = (
        estimate_speed(a_case(*words, recipe=SMOL, world=8, device="cuda", recompute=mode), device)
        for mode in ("none", "full")
    )
    assert none.step_s < full.step_s < 4 / 3 * none.step_s
    assert none.mfu > full.mfu
    assert 0.1 < none.mfu < 0.7
    assert estimate_speed(a_case(*words, recipe=SMOL, world=1, device="cuda"), device).parts["reduction"] == 0
    stages = [a_case(*words, recipe=SMOL, world=8, device="cuda").with_zero_stage(stage) for stage in (1, 2, 3)]
    sent = [reduction_bytes(case) for case in stages]
    assert sent == sorted(sent)


def test_a_measurement_corrects_both():
    case, device = a_case(recipe=SMOL, device="cuda"), GPUS["l4"]
    rates = correct_efficiency(CUDA_EFFICIENCY, 2.0, 3.0)
    assert estimate_speed(case, device, rates).step_s == pytest.approx(1.5 * estimate_speed(case, device).step_s)
    found = 7e9
    base = found - estimate_memory(case, 0.0).total
    assert estimate_memory(case, base).total == pytest.approx(found)
    lines = [{"step": i, "speed/step_s": 9.0 if i < 5 else 2.0, "memory/peak_gib": 1 + i / 10} for i in range(20)]
    told = summarize_run_metrics([{"step": 0, "validation/loss_nats_per_token": 1.0}, *lines])
    assert (told.step_s, told.peak_bytes) == (2.0, pytest.approx(2.9 * 2**30))


# ---- disk


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
            there = steps_to_keep(dict.fromkeys(there), plan, settings.checkpoint)
    assert most <= max_num_checkpoints(plan, settings) <= most + 2


# ---- the verb


def run(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        main(["estimate", *words])
    return left.value.code


def test_the_verb_tells_parts_alternatives_and_advice(capsys: pytest.CaptureFixture[str]):
    assert not run(SMOL, "batch.sequence_length=2048", "batch.micro_batch=8", "--world", "8", "--device", "h200")
    out = capsys.readouterr().out
    assert "134,515,008 parameters on 8 x h200, ZeRO-2, bf16" in out
    for word in (*PART_LABELS.values(), "matmuls", "in all", "every 2.", "2*", "checkpoints of"):
        if word not in ("the update's temporaries", "a checkpoint in the making"):
            assert word in out, word
    assert "ZeRO-2 is" in out
    assert "the fastest that fits" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--device", "h20"), "no such device: saw 'h20', want 'h200' (the nearest valid one)"),
        (("--device", "l4", "--measure"), "--measure runs on this machine: saw no CUDA device"),
        (
            ("--world", "3", "batch.rows_per_step=8", "batch.accumulation=null", "--device", "l4"),
            "do not divide evenly",
        ),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available() and "--measure" in words:
        pytest.skip("there is a CUDA device, so that it would run; the other cases refuse")
    assert run("quickstart", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]):
    assert not run(SMOL, "batch.sequence_length=8192", "batch.micro_batch=32", "--device", "l4")
    out = capsys.readouterr().out
    assert "does not fit l4 (22 GiB a rank)" in out
    assert not run(SMOL, "batch.micro_batch=16384", "--device", "l4")
    assert "nothing in the table fits: take a smaller batch.micro_batch" in capsys.readouterr().out


@pytest.mark.slow
def test_measure_trains_here_and_says_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert not run("quickstart", *tiny.words(tmp_path), "engine.device=cpu", "--device", "cpu", "--measure")
    out = capsys.readouterr().out
    assert "measured here, 1 x cpu: step " in out
    assert not (tmp_path / "runs").exists(), "the run's own folder is left alone"
