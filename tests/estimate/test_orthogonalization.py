"""What Muon costs: its state and temporaries against real tensors, what it sends against the exchange's own plan."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import profile

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.engine.hidden_matrices import split_parameters
from smoltrain.engine.matrix_exchange import plan_matrices
from smoltrain.engine.muon import plan_whole_matrices
from smoltrain.engine.optimizer import OPTIMIZERS, build_optimizer, checkpoint_bytes, set_hyperparameters
from smoltrain.engine.reshard import build_shard_layout
from smoltrain.estimate.constants import GPUS, MUON_STACK_OPERATIONS
from smoltrain.estimate.memory import estimate_memory
from smoltrain.estimate.orthogonalization import (
    count_stacks,
    orthogonalization_operations,
    orthogonalization_sent_bytes,
    orthogonalization_temporary_bytes,
)
from smoltrain.estimate.speed import estimate_speed
from smoltrain.kernels import newton_schulz
from smoltrain.kernels.newton_schulz import newton_schulz_flops
from smoltrain.model.build import build_model
from tests.estimate.setups import QUICKSTART, SMOL, make_setup

SMALL = ("model.hidden_size=256", "model.num_hidden_layers=3", "model.intermediate_size=640")
LLAMA = (
    "model={kind: transformers, model_type: llama, vocab_size: 2048, max_position_embeddings: 512, config: "
    "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 192}}",
)
MUON = ("optimizer=muon",)


def trained_once(config: Config) -> torch.optim.Optimizer:
    """The optimizer of a model after one update."""
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optimizer, torch.device("cpu"))
    set_hyperparameters(optimizer.param_groups, lr=1e-3, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("model", [SMALL, LLAMA], ids=["decoder", "llama"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_state_is_as_large_as_its_tensors(model: tuple[str, ...], kind: str):
    words = (*model, f"optimizer={kind}")
    optimizer = trained_once(load_config("quickstart", (*QUICKSTART, *words)))
    tensors = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    case = make_setup(*words)
    assert sum(x.nbytes for x in tensors) == case.optimizer_state_bytes
    hidden = case.shape.hidden_parameters
    saved = checkpoint_bytes(case.optimizer, hidden, case.shape.parameters - hidden, 2)
    assert saved == 6 * case.shape.parameters + case.optimizer_state_bytes


def test_muon_needs_one_number_less_for_each_element_of_a_hidden_matrix():
    adamw, muon = (estimate_memory(make_setup(f"optimizer={kind}", recipe=SMOL)) for kind in ("adamw", "muon"))
    hidden = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert adamw["optimizer"] - muon["optimizer"] == 4 * hidden


def largest_allocation(action: Callable[[], Any]) -> int:
    """Bytes that are allocated on the host at the fullest moment of a call, beyond those before it."""
    with profile(profile_memory=True) as recorded:
        action()
    now = fullest = 0
    results: Any = recorded.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    for event in results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            fullest = max(fullest, now)
    return fullest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temporaries_of_a_step_are_those_that_torch_allocates(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    for place in ("smoltrain.kernels.newton_schulz", "smoltrain.estimate.orthogonalization"):
        monkeypatch.setattr(f"{place}.choose_dtype", lambda _: (dtype, "as the test asks"))
    words = (*SMALL, *MUON)
    optimizer = trained_once(load_config("quickstart", words))
    optimizer.param_groups = [group for group in optimizer.param_groups if group["hidden"]]
    estimated = orthogonalization_temporary_bytes(make_setup(*words, compiled_update=False))
    assert largest_allocation(optimizer.step) == pytest.approx(estimated, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_one_pass_the_updates_lie_where_the_gradients_were(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    for place in ("smoltrain.kernels.newton_schulz", "smoltrain.estimate.orthogonalization"):
        monkeypatch.setattr(f"{place}.choose_dtype", lambda _: (dtype, "as the test asks"))
    words = (*SMALL, *MUON)
    optimizer: Any = trained_once(load_config("quickstart", words))
    group = next(group for group in optimizer.param_groups if group["hidden"])
    updates = [torch.randn_like(matrix) for matrix in group["params"]]
    in_place = functools.partial(optimizer.orthogonalize_updates, group, group["params"], updates)
    estimated = orthogonalization_temporary_bytes(make_setup(*words, compiled_update=True))
    assert largest_allocation(in_place) == pytest.approx(estimated, rel=0.05)


@pytest.mark.parametrize("batch", [2**24, 2**18], ids=["all at once", "few at once"])
def test_temporaries_of_a_masked_step_are_those_of_a_gpu(monkeypatch: pytest.MonkeyPatch, batch: int):
    """Its order of computing, in fp32, in which a CPU makes no casts of its own. Of few at once the mask is most."""
    monkeypatch.setattr("smoltrain.engine.matrix_exchange.BATCH_ELEMENTS", batch)
    monkeypatch.setattr("smoltrain.estimate.orthogonalization.BATCH_ELEMENTS", batch)
    monkeypatch.setattr("smoltrain.estimate.orthogonalization.iteration_dtype", lambda _: torch.float32)
    stacks = newton_schulz._orthogonalize_stacks
    monkeypatch.setattr("smoltrain.engine.muon.orthogonalize", lambda some, steps: stacks(some, steps, torch.float32))
    words = (*SMALL, *MUON)
    optimizer: Any = trained_once(load_config("quickstart", words))
    optimizer.param_groups = [group for group in optimizer.param_groups if group["hidden"]]
    optimizer.found_inf = torch.zeros(())
    case = make_setup(*words, compiled_update=False, precision="fp32")
    estimated = orthogonalization_temporary_bytes(dataclasses.replace(case, device="cuda"))
    assert largest_allocation(optimizer.step) == pytest.approx(estimated, rel=0.05)


def sent_elements(config: Config, stage: int, world: int) -> list[int]:
    """By rank, what it sends in an update as the exchange plans it."""
    hidden = split_parameters(build_model(config.model, device="meta")).hidden
    shapes = {name: (matrix.size(0), matrix.size(1)) for name, matrix in hidden.items()}
    if stage == 0:
        plan = plan_whole_matrices(list(hidden.values()), world, 5)
    else:
        layout = build_shard_layout(stage, [{name: torch.Size(shape) for name, shape in shapes.items()}], None, world)
        slices = [list(layout.parameter_slices(rank)) for rank in range(world)]
        plan = plan_matrices(shapes, slices, functools.partial(newton_schulz_flops, steps=5))
    sent = []
    for rank in range(world):
        pieces = [piece for other in range(world) for piece in plan.slices_to_owner(rank, other)]
        pieces += [piece for other in range(world) for piece in plan.slices_from_owner(rank, other)]
        sent.append(sum(piece.stop - piece.first for piece in pieces))
    return sent


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_sent_is_what_the_exchange_plans(stage: int, world: int):
    config = load_config(SMOL, MUON)
    planned = [4 * elements for elements in sent_elements(config, stage, world)]
    case = make_setup(*MUON, "batch.micro_batch=1", "batch.rows_per_step=24", recipe=SMOL, world=world)
    estimated = orthogonalization_sent_bytes(dataclasses.replace(case, stage=stage))
    if stage == 2:  # at most: where a border cuts a matrix is chance
        assert max(planned) <= estimated <= 4 * case.shape.hidden_parameters / 20
    else:
        assert sum(planned) / world == pytest.approx(estimated, rel=0.02)


def test_ranks_share_the_operations():
    words = (*MUON, "batch.micro_batch=1", "batch.rows_per_step=24")
    one, eight = (make_setup(*words, recipe=SMOL, world=world) for world in (1, 8))
    assert orthogonalization_operations(one) == 8 * orthogonalization_operations(eight)
    gpu = make_setup(*words, recipe=SMOL, device="cuda")
    m, n = 576, 1536
    by_shape = {(576, 576): 60, (192, 576): 60, (m, n): 90}  # queries and outputs, keys and values, the MLP
    assert orthogonalization_operations(gpu) == sum(
        count * newton_schulz_flops(*shape, 5) for shape, count in by_shape.items()
    )
    three = make_setup(*words, "optimizer.newton_schulz_steps=3", recipe=SMOL, device="cuda")
    assert orthogonalization_operations(three) == 3 / 5 * orthogonalization_operations(gpu)


def test_matrices_of_the_same_sides_are_multiplied_at_once():
    alone, shared = (make_setup(*MUON, recipe=SMOL, device="cuda", world=world) for world in (1, 8))
    assert (count_stacks(alone), count_stacks(shared)) == (8, 3), "q and o, k and v, the MLP's"
    counted = 224  # tests/engine/test_muon.py
    assert count_stacks(alone) * MUON_STACK_OPERATIONS == pytest.approx(counted, rel=0.15)


def test_time_and_temporaries_are_of_muon_alone():
    words = ("batch.micro_batch=3", "batch.rows_per_step=24")
    adamw, muon = (make_setup(*words, f"optimizer={k}", recipe=SMOL, device="cuda", world=8) for k in OPTIMIZERS)
    assert orthogonalization_temporary_bytes(adamw) == orthogonalization_sent_bytes(adamw) == 0
    slow, fast = (estimate_speed(case, GPUS["h100"]).parts for case in (muon, adamw))
    assert fast["orthogonalisation"] == 0 < slow["orthogonalisation"]
    assert slow["update"] < fast["update"], "it reads one state less"


def test_temporaries_on_several_ranks_hold_what_comes_and_goes():
    words = (*MUON, "batch.micro_batch=1", "batch.rows_per_step=24")
    one, eight = (make_setup(*words, recipe=SMOL, world=world) for world in (1, 8))
    bytes_by_stage = [orthogonalization_temporary_bytes(dataclasses.replace(eight, stage=stage)) for stage in (0, 2, 3)]
    assert bytes_by_stage[0] > bytes_by_stage[2] > bytes_by_stage[1]
    assert bytes_by_stage[1] - 8 * 576 * 1536 <= orthogonalization_temporary_bytes(one)
    assert newton_schulz.choose_dtype(torch.device("cpu"))[0] in (torch.bfloat16, torch.float32)
