"""The optimizer: what decays, what a reset leaves, how a gradient is clipped, and its sizes."""

import math
from typing import Any

import pytest
import torch

from smoltrain.config.schema import OptimizerSection
from smoltrain.engine.matrix_exchange import MatrixExchange
from smoltrain.engine.muon import plan_whole_matrices
from smoltrain.engine.optimizer import (
    OPTIMIZERS,
    build_optimizer,
    checkpoint_bytes,
    clipping_factor,
    reset_optimizer_state,
    set_hyperparameters,
)
from smoltrain.engine.optimizer_kind import is_elementwise_state
from smoltrain.kernels.compile import CompilableFunction

GROUP = {"decays": True, "hidden": False, "lr": 0.1, "weight_decay": 0.1}


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    frozen = torch.nn.Linear(3, 3, bias=False)
    frozen.weight.requires_grad_(False)
    return torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Embedding(5, 4), frozen])


def test_the_schema_knows_each_optimizer_and_no_other() -> None:
    assert set(OptimizerSection.model_fields["kind"].annotation.__args__) == set(OPTIMIZERS)  # pyright: ignore


def test_matrices_decay_and_vectors_do_not() -> None:
    optimizer = build_optimizer(model_of(), OptimizerSection(), torch.device("cpu"))
    set_hyperparameters(optimizer.param_groups, lr=0.5, weight_decay=0.1)
    matrices, vectors = optimizer.param_groups
    assert sorted(tuple(p.shape) for p in matrices["params"]) == [(3, 4), (5, 4)]
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,)] * 3
    assert (matrices["lr"], matrices["weight_decay"]) == (0.5, 0.1)
    assert (vectors["lr"], vectors["weight_decay"]) == (0.5, 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_it_says_of_its_state_is_so(name: str) -> None:
    """Names and sizes after a step; and after a reset the next step is that of a new optimizer."""
    model, kind = model_of(), OPTIMIZERS[name]
    optimizer = build_optimizer(model, OptimizerSection(kind=name), torch.device("cpu"))  # pyright: ignore
    set_hyperparameters(optimizer.param_groups, lr=0.1, weight_decay=0.0)
    gradients = {p: torch.randn_like(p) for p in model.parameters() if p.requires_grad}

    def step() -> dict[torch.Tensor, torch.Tensor]:
        before = {p: p.detach().clone() for p in gradients}
        for p, gradient in gradients.items():
            p.grad = gradient.clone()
        optimizer.step()
        return {p: p.detach() - before[p] for p in gradients}

    first = step()
    for p, state in optimizer.state.items():
        (group,) = [group for group in optimizer.param_groups if any(p is one for one in group["params"])]
        have = {name for name, value in state.items() if is_elementwise_state(value)}
        assert have == set(kind.names_of_state(group))
    counts = (12, 29)  # weights of the hidden matrix, and of the rest
    states = [x for state in optimizer.state.values() for x in state.values() if is_elementwise_state(x)]
    assert sum(x.nbytes for x in states) == kind.state_bytes(*counts)
    gradients = {p: -3 * gradient for p, gradient in gradients.items()}
    step()
    reset_optimizer_state(optimizer)
    gradients = {p: gradient / -3 for p, gradient in gradients.items()}
    for p, moved in step().items():
        torch.testing.assert_close(moved, first[p], rtol=1e-4, atol=1e-6)


def test_the_norm_is_cut_down_to_the_largest_and_never_up() -> None:
    norms = torch.tensor([4.0, 0.5, 0.0, math.inf], dtype=torch.float64)
    assert clipping_factor(norms, 1.0).tolist() == pytest.approx([0.25, 1.0, 1.0, 0.0], rel=1e-6)
    assert clipping_factor(norms, 0.0).tolist() == [1.0] * 4, "0 never clips"


def test_a_checkpoint_holds_weights_twice_and_masters_and_state_once() -> None:
    assert checkpoint_bytes(OPTIMIZERS["adamw"], 600, 400, 2) == 1000 * (2 + 4 + 2 * 4)
    assert OPTIMIZERS["adamw"].traffic_bytes(600, 400) == 28 * 1000
    assert checkpoint_bytes(OPTIMIZERS["muon"], 600, 400, 2) == 1000 * (2 + 4) + 600 * 4 + 400 * 8


SOUND = torch.tensor([0.5, 1.0])  # verdicts: what the gradient is multiplied by, and whether anything moves
REFUSED = torch.tensor([math.nan, 0.0])


def update_repeatedly(name: Any, is_hidden: bool, way: str, verdicts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Master, weights and state after updates of a group with one matrix; those that are refused have no sound number.

    way: "one pass"; "own step", as on a GPU where nothing is compiled; "asked", where the host goes by the verdict.
    """
    kind = OPTIMIZERS[name]
    matrix = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).view(-1))
    group = {**GROUP, "hidden": is_hidden, "momentum": 0.9, "newton_schulz_steps": 5, "params": [matrix]}
    optimizer: Any = kind.build([group], OptimizerSection(), torch.device("cuda" if way == "own step" else "cpu"))
    if is_hidden:
        optimizer.bind(matrix, MatrixExchange(plan_whole_matrices([matrix.detach().view(3, 4)], 1, 5)))
    master, weights = matrix.detach(), matrix.detach().bfloat16()
    for verdict in verdicts:
        before = (master.clone(), weights.clone())
        moves = verdict[1]
        gradient = torch.linspace(-1, 1, 12) if moves else torch.full((12,), math.inf)
        if way == "one pass":
            with torch.no_grad():
                kind.update_in_one_pass(optimizer, optimizer.param_groups[0], matrix, weights, gradient, verdict)
            kind.finish_one_pass(optimizer, applied=bool(moves))
        elif moves or way == "own step":
            assert kind.masks_own_step(optimizer) == (way == "own step")
            matrix.grad = gradient * verdict[0]
            optimizer.found_inf = 1 - moves if way == "own step" else None
            optimizer.step()
            weights.copy_(master)
        stayed = [same_bits(*pair) for pair in zip((master, weights), before, strict=True)]
        assert stayed == [not moves] * 2
    return [master, weights, *optimizer.state[matrix].values()]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Where torch.equal takes -0 for 0."""
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


@pytest.mark.parametrize("way", ["one pass", "own step"])
@pytest.mark.parametrize(("name", "is_hidden"), [("adamw", False), ("muon", False), ("muon", True)])
def test_an_update_that_must_not_move_leaves_every_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, is_hidden: bool, way: str
) -> None:
    """Whatever the gradient is; and the next one is that of an optimizer which never saw it."""
    monkeypatch.setattr(CompilableFunction, "compiled", property(lambda function: function))
    with_refused = update_repeatedly(name, is_hidden, way, [REFUSED, SOUND, REFUSED, REFUSED, SOUND])
    without = update_repeatedly(name, is_hidden, way, [SOUND, SOUND])
    assert all(same_bits(*pair) for pair in zip(with_refused, without, strict=True))
    asked = update_repeatedly(name, is_hidden, "asked", [SOUND, SOUND])
    for ours, theirs in zip(without, asked, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if is_hidden and way == "own step":
        assert all(same_bits(*pair) for pair in zip(without, asked, strict=True)), "a mask changes no number"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_a_step_that_was_not_fused_goes_on_in_one_that_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a run that moves from a CPU to a GPU, where alone the step is fused and masks itself."""
    kind = type(OPTIMIZERS[name])
    build = kind.build
    model = model_of()
    section = OptimizerSection(kind=name)  # pyright: ignore
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(optimizer: torch.optim.Optimizer) -> None:
        set_hyperparameters(optimizer.param_groups, lr=0.1, weight_decay=0.0)
        for p in trained:
            p.grad = torch.ones_like(p)
        optimizer.step()

    on_cpu = build_optimizer(model, section, torch.device("cpu"))
    step(on_cpu)
    saved = on_cpu.state_dict()
    gpu = torch.device("cuda")
    monkeypatch.setattr(kind, "build", lambda self, groups, section, _: build(self, groups, section, gpu))
    on_gpu = build_optimizer(model, section, torch.device("cpu"))
    on_gpu.load_state_dict(saved)
    assert all(group["fused"] for group in on_gpu.param_groups)
    before = [p.detach().clone() for p in trained]
    on_gpu.found_inf = torch.tensor(1.0)  # pyright: ignore[reportAttributeAccessIssue]
    step(on_gpu)
    assert all(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    on_gpu.found_inf = torch.tensor(0.0)  # pyright: ignore[reportAttributeAccessIssue]
    step(on_gpu)
    assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert {float(state["step"]) for state in on_gpu.state.values() if "step" in state} == {2.0}
