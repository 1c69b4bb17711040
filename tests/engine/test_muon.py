"""Muon against torch.optim.Muon with AdamW in a plain loop: same rows, same losses, same weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config, OptimizerSection
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.engine.deepspeed_json import fill_deepspeed_config
from smoltrain.engine.muon import MuonOptimizer
from smoltrain.engine.optimizer import set_hyperparameters
from smoltrain.errors import UserError
from tests import tiny
from tests.device_ops import DeviceOps
from tests.engine import test_deepspeed_steps as steps
from tests.engine import test_shards as shards
from tests.engine.test_engine import PLAN, STEPS, Numbers, engine_losses, furthest, plain_run
from tests.engines import engine_of, fresh_model, loader_of, settings_of, train, whole_state
from tests.ranks import world
from tests.sessions import bare_session, train_steps

MUON = ("optimizer.kind=muon", "optimizer.embedding_lr_factor=0.5")


def iterate_in_fp32(
    gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """torch.optim.Muon's Newton-Schulz iterations without its cast to bf16."""
    a, b, c = coefficients
    tall = gradient.size(0) > gradient.size(1)
    X = gradient.T if tall else gradient
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.T if tall else X


@contextmanager
def newton_schulz_in_fp32() -> Iterator[None]:
    """Inside, ours and torch's iterations are in fp32: in bf16 they make 5e-5 of a loss out of its last bit."""
    from torch.optim import _muon

    from smoltrain.kernels import newton_schulz

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newton_schulz, "choose_dtype", lambda *_: (torch.float32, "as the test asks"))
        patch.setattr(_muon, "_zeropower_via_newtonschulz", iterate_in_fp32)
        yield


def muon_losses(settings: Config, precision: str) -> Numbers:
    """See engine_losses; runs on every rank."""
    with newton_schulz_in_fp32():
        return engine_losses(settings, precision, STEPS)


WAYS = [(0, "auto"), (1, "step"), (1, "micro_batch"), (2, "step"), (2, "micro_batch"), (3, "auto")]  # stage, reduce
QUICK = {(2, "step", 2), (3, "auto", 2)}
CASES = [
    pytest.param(*way, size, marks=() if (*way, size) in QUICK else pytest.mark.slow) for way in WAYS for size in (1, 2)
]


@pytest.mark.parametrize(("stage", "reduce", "size"), CASES)
def test_fp32_equals_plain_torch_at_every_zero_stage(
    tmp_path: Path, ranks: Any, stage: int, reduce: str, size: int
) -> None:
    ways = (f"engine.ds_config=zero{stage}", f"engine.reduce_gradients={reduce}")
    settings = tiny.load(tmp_path, *PLAN, "engine.precision=fp32", *ways, *MUON)
    prepare_run_data(settings)
    with newton_schulz_in_fp32():
        expected, expected_norms, expected_weights = plain_run(size, "engine.precision=fp32", *MUON)
    for losses, norms, weights in ranks(size).run(muon_losses, settings, "fp32"):
        assert losses == pytest.approx(expected, abs=1e-6)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert furthest(weights, expected_weights) < 1e-5
    assert expected[-1] < expected[0] - 0.5, "the reference itself must learn, or agreement proves nothing"


@pytest.mark.parametrize(
    ("clipping", "stage", "reduce"),
    [
        (1.0, 2, "step"),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in ((0.0, 2, "step"), (0.0, 1, "auto"), (0.0, 2, "micro_batch"), (1.0, 2, "micro_batch"))
        ),
    ],
)
def test_bf16_with_fp32_accumulation_equals_plain_torch(
    tmp_path: Path, ranks: Any, stage: int, reduce: str, clipping: float
) -> None:
    """As AdamW's proof. The last bit of a master is another, as torch multiplies by rate and scale at once."""
    options = ("engine.precision=bf16", f"optimizer.gradient_clipping={clipping}", *MUON)
    ways = (f"engine.ds_config=zero{stage}", f"engine.reduce_gradients={reduce}")
    settings = tiny.load(tmp_path, *PLAN, *options, *ways)
    prepare_run_data(settings)
    with newton_schulz_in_fp32():
        expected, expected_norms, expected_weights = plain_run(2, *options)
    for losses, norms, weights in ranks(2).run(muon_losses, settings, "bf16"):
        assert losses == pytest.approx(expected, rel=5e-4)
        assert norms == pytest.approx(expected_norms, rel=2.5e-2)
        assert furthest(weights, expected_weights) <= 2.5e-2
    assert expected[-1] < expected[0] - 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 0.01)])
def test_on_one_rank_momentum_is_torchs_to_the_bit(dtype: torch.dtype, tolerance: float) -> None:
    """And the weights come out as torch's, as far as the iterations agree: torch's are always in bf16."""
    torch.manual_seed(0)
    shapes = ((12, 7), (7, 12), (9, 9))
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    section = OptimizerSection(kind="muon", momentum=0.9)
    group = {"params": ours, "decays": True, "hidden": True, "momentum": 0.9, "newton_schulz_steps": 4}
    optimizer = MuonOptimizer([group], section, fused=False)
    numbers = {"lr": 0.01, "weight_decay": 0.1}
    wanted = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.1, momentum=0.9, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smoltrain.kernels.newton_schulz.choose_dtype", lambda *_: (dtype, "as the test asks"))
        for _ in range(20):
            set_hyperparameters(optimizer.param_groups, **numbers)
            for one, other in zip(ours, theirs, strict=True):
                one.grad = torch.randn_like(one)
                other.grad = one.grad.clone()
            optimizer.step()
            wanted.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[one]["momentum_buffer"], wanted.state[other]["momentum_buffer"])
        assert float((one - other).detach().norm()) < tolerance * float((1 - other).detach().norm())


# ---- steps that are not taken


def overflow_between(settings: Config, overflows: bool) -> tuple[dict[str, torch.Tensor], float]:
    """(weights, last norm) of steps 1 and 3; the gradient of step 2 is not finite, or never was."""
    engine = steps.engine_of(settings)
    steps.backward(engine, 1)
    assert engine.update(lr=1e-2, weight_decay=0.1)
    if overflows:
        steps.backward(engine, 2, math.inf if world().rank == 1 else 1.0)
        assert not engine.update(lr=1e-2, weight_decay=0.1)
    steps.backward(engine, 3)
    assert engine.update(lr=1e-2, weight_decay=0.1)
    return steps.numbers(engine), engine.grad_norm_before_clipping


QUICK_WAYS = [(2, "bf16", "step"), (3, "fp32", "auto")]
each_way = pytest.mark.parametrize(
    ("stage", "precision", "by"),
    [pytest.param(*way[:3], marks=() if way[:3] in QUICK_WAYS else pytest.mark.slow) for way in steps.WAYS],
)


@each_way
def test_a_step_that_is_skipped_or_dropped_leaves_the_momentum_alone(
    tmp_path: Path, ranks: Any, stage: int, precision: str, by: str
) -> None:
    """The step after it shows: its update is the momentum's."""
    settings = settings_of(tmp_path, stage, precision, by, "muon")
    without = ranks(2).run(overflow_between, settings, False)
    for (expected, norm), (weights, same_norm) in zip(
        without, ranks(2).run(overflow_between, settings, True), strict=True
    ):
        assert steps.is_same(weights, expected)
        assert same_norm == norm
    for (expected, norm), (stayed, weights, same_norm) in zip(
        without, ranks(2).run(steps.discard_between, settings, True), strict=True
    ):
        assert stayed
        assert steps.is_same(weights, expected)
        assert same_norm == norm


def reset(settings: Config) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """The state after two steps, and after a reset."""
    engine = engine_of(settings, seed=1)
    train(engine, 1, 2)
    before = whole_state(engine)
    engine.reset_optimizer()
    return before, whole_state(engine)


@each_way
def test_a_reset_begins_at_zero(tmp_path: Path, ranks: Any, stage: int, precision: str, by: str) -> None:
    for before, after in ranks(2).run(reset, settings_of(tmp_path, stage, precision, by, "muon")):
        assert before.pop("step") == [2.0]
        assert after.pop("step") == [0.0]
        for name, (master, *states, weights) in after.items():
            assert (master, weights) == (before[name][0], before[name][-1])
            assert len(states) == (1 if name in ("up.weight", "down.weight") else 2)
            assert torch.tensor(before[name][1]).any()
            assert not any(torch.tensor(state).any() for state in states)


# ---- checkpoints


@pytest.mark.parametrize(
    ("old", "old_stage", "readers"),
    [
        (2, 2, [(1, 3)]),
        pytest.param(3, 2, [(2, 3), (1, 1)], marks=pytest.mark.slow),
        pytest.param(2, 3, [(size, stage) for size in (1, 2, 3) for stage in (1, 2, 3)], marks=pytest.mark.slow),
        pytest.param(1, 1, [(size, stage) for size in (1, 2, 3) for stage in (1, 2, 3)], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_any_world_and_stage_goes_on_from_another(
    tmp_path: Path, ranks: Any, old: int, old_stage: int, readers: list[tuple[int, int]], precision: str
) -> None:
    """Momentum and moments bit for bit; then other sums over ranks, of which bf16 iterations make more."""
    wrote = ranks(old).run(shards.write, settings_of(tmp_path, old_stage, precision, kind="muon"), tmp_path / "old")
    for size, stage in readers:
        settings = settings_of(tmp_path, stage, precision, kind="muon")
        found = ranks(size).run(shards.read, settings, tmp_path / "old", old_stage)
        shards.assert_same(wrote, found, precision, tolerance=2e-2)


@each_way
def test_the_same_world_goes_on_bitwise(tmp_path: Path, ranks: Any, stage: int, precision: str, by: str) -> None:
    settings = settings_of(tmp_path, stage, precision, by, "muon")
    wrote = ranks(2).run(shards.write, settings, tmp_path / "old")
    assert ranks(2).run(shards.read, settings, tmp_path / "old", stage) == wrote


# ---- fp16, one pass, transformers


def momentum_of_first_step(settings: Config) -> list[torch.Tensor]:
    """Each matrix's momentum after the first step that is taken, always of the same rows."""
    engine = steps.engine_of(settings)
    applied = False
    for _ in range(20):
        steps.backward(engine, 1)
        applied = applied or engine.update(lr=0.0, weight_decay=0.0)
        if applied:
            break
    assert applied, "every step was skipped"
    if engine.stage > 0:
        state = whole_state(engine)
        return [torch.tensor(state[name][1]) for name in ("up.weight", "down.weight")]
    optimizer = engine._deepspeed.optimizer  # of fp16, whose masters are no parameters of the model
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return [optimizer.state[p]["momentum_buffer"].clone() for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize(
    "file", ["zero0", "zero2_fp16", *(pytest.param(file, marks=pytest.mark.slow) for file in ("zero1", "zero3"))]
)
def test_the_momentum_is_of_gradients_without_the_loss_scale(tmp_path: Path, ranks: Any, file: str) -> None:
    """In fp16 DeepSpeed multiplies the loss, by 65536 at first, and skips what overflows."""
    half = ranks(2).run(momentum_of_first_step, settings_of(tmp_path, file, "fp16", kind="muon"))
    full = ranks(2).run(momentum_of_first_step, settings_of(tmp_path, 2, "fp32", kind="muon"))
    for ours, theirs in zip(half, full, strict=True):
        for momentum, expected in zip(ours, theirs, strict=True):
            assert float((momentum - expected).norm()) < 0.02 * float(expected.norm())
            assert float(expected.norm()) > 1e-4


def compiled_losses(settings: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Twelve steps with passes that torch.compile has made; runs on every rank."""
    from smoltrain.engine.build_engine import build_engine

    here = world()
    with newton_schulz_in_fp32():
        wrapped = build_engine(
            fresh_model(settings), settings, here, precision=settings.engine.precision, accumulation=2, compiles=True
        )
        loader = loader_of(settings, here.rank, here.size)
        results = train_steps(range(1, STEPS + 1), bare_session(settings, wrapped, loader))
    return [result.metrics["train/loss_nats_per_token"] for result in results], wrapped.weights(keep=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_compiled_passes_equal_plain_torch(tmp_path: Path, ranks: Any, size: int) -> None:
    settings = tiny.load(tmp_path, *PLAN, "engine.precision=fp32", "engine.reduce_gradients=step", *MUON)
    prepare_run_data(settings)
    with newton_schulz_in_fp32():
        expected, _, expected_weights = plain_run(size, "engine.precision=fp32", *MUON)
    for losses, weights in ranks(size).run(compiled_losses, settings):
        assert losses == pytest.approx(expected, abs=1e-6)
        assert furthest(weights, expected_weights) < 1e-5


OTHERS = "kind: transformers, vocab_size: 320, max_position_embeddings: 64"
GPT2 = f"model={{{OTHERS}, model_type: gpt2, config: {{n_embd: 32, n_layer: 2, n_head: 4}}}}"
LLAMA_SHAPE = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4"
LLAMA = f"model={{{OTHERS}, model_type: llama, config: {{{LLAMA_SHAPE}}}}}"


@pytest.mark.parametrize("model", [GPT2, pytest.param(LLAMA, marks=pytest.mark.slow)])
def test_models_of_transformers_train_with_it(tmp_path: Path, ranks: Any, model: str) -> None:
    settings = tiny.load(tmp_path, *PLAN, model, "engine.precision=fp32", *MUON)
    prepare_run_data(settings)
    for losses, _, _ in ranks(2).run(engine_losses, settings, "fp32", STEPS):
        assert losses[-1] < losses[0] - 0.4


# ---- on a GPU


def kernels_of_orthogonalization(num_layers: int) -> int:
    """For the matrices of SmolLM2-135M, of which only the shapes are there."""
    layer = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    updates = [torch.empty(shape, device="meta") for shape in layer * num_layers]
    matrices = [torch.nn.Parameter(update) for update in updates]
    group = {"params": matrices, "decays": True, "hidden": True, "momentum": 0.9, "newton_schulz_steps": 5}
    optimizer = MuonOptimizer([group], OptimizerSection(kind="muon"), fused=False)
    with DeviceOps() as counted:
        optimizer.orthogonalize_updates(group, matrices, updates)
    return counted.num_kernels


def test_matrices_of_the_same_sides_are_multiplied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pairs of sides, 15 products and a few operations more for each, and 7 batches of memory for 210 of them."""
    monkeypatch.setattr("smoltrain.kernels.newton_schulz.choose_dtype", lambda _: (torch.bfloat16, "as on a GPU"))
    assert kernels_of_orthogonalization(1) <= 67
    assert kernels_of_orthogonalization(30) <= 224


# ---- what is refused


def test_what_was_not_proven_is_refused(tmp_path: Path) -> None:
    key = "zero_optimization.offload_optimizer"
    words = ("engine.ds_config=zero2_offload", "engine.precision=fp32")
    fill = {"precision": "fp32", "accumulation": 1, "world_size": 1}
    fill_deepspeed_config(tiny.load(tmp_path, *words), **fill)
    with pytest.raises(UserError, match=f"muon does not go with this part of the DeepSpeed config: saw {key}"):
        fill_deepspeed_config(tiny.load(tmp_path, *words, *MUON), **fill)
