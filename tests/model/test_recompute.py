"""Gradient checkpointing computes again what it should, and changes no number."""

from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from smoltrain.errors import UserError
from smoltrain.kernels import cpu_attention
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.cpu_attention import BLOCKED_ATTENTION
from smoltrain.kernels.joint_linear import JOINT_LINEAR
from smoltrain.model.interface import SDPA_KERNEL
from smoltrain.model.recompute import GradientCheckpointing, find_kept_operators
from tests.model.tiny_decoders import LLAMA, built, loss_and_gradients, section


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["full", "selective", 1, 2, 5])
def test_gradient_checkpointing_changes_no_number(
    mode: Literal["full", "selective"] | int, dropout: float, monkeypatch: pytest.MonkeyPatch
):
    runs = []
    for chosen in ("none", mode):
        model = built(section(LLAMA, dropout=dropout, attention_dropout=dropout), gradient_checkpointing=chosen)
        calls = []
        for i, block in enumerate(model.layers):
            block.register_forward_pre_hook(lambda module, args, i=i, calls=calls: calls.append(i))
        runs.append((*loss_and_gradients(model), calls))
    (plain, plain_gradients, once), (loss, grads, twice) = runs
    assert torch.equal(loss, plain)
    assert all(torch.equal(grads[name], x) for name, x in plain_gradients.items())
    assert once == [0, 1, 2]
    again = {"full": [2, 1, 0], "selective": [2, 1, 0], 1: [2, 1, 0], 2: [2, 0], 5: [0]}[mode]
    assert twice == [0, 1, 2, *again]


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_does_not_compute_attention_again(mode: str, times: int, monkeypatch: pytest.MonkeyPatch):
    """torch's profiler would count a matrix product that is only looked up, too; what is counted here is our code."""
    model = built(section(LLAMA), gradient_checkpointing=mode, attention=AttentionKernel("blocked", "test"))
    computed, real = [], cpu_attention._attention_weights
    monkeypatch.setattr(cpu_attention, "_attention_weights", lambda *args: (computed.append(1), real(*args))[1])
    loss_and_gradients(model)
    assert len(computed) == times * len(model.layers)


def test_selective_keeps_matrix_products_and_attention():
    kept = find_kept_operators(SDPA_KERNEL)
    aten = torch.ops.aten
    assert {aten.mm.default, aten.addmm.default, BLOCKED_ATTENTION, JOINT_LINEAR} < set(kept)
    assert len(kept) == 8
    assert aten.silu.default not in kept
    assert aten.mul.Tensor not in kept


def test_a_torch_that_lacks_an_operator_is_named(monkeypatch: pytest.MonkeyPatch):
    """Its names are private: a torch to come may have others, and then only `selective` is refused."""
    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace(mm=torch.ops.aten.mm, addmm=torch.ops.aten.addmm))
    with pytest.raises(UserError) as error:
        GradientCheckpointing("selective", compiles=False, attention=SDPA_KERNEL)
    (problem,) = error.value.problems
    assert problem.saw.endswith("without the operator aten::_scaled_dot_product_flash_attention")
    assert problem.change == "engine.gradient_checkpointing"
    for mode in ("none", "full", 2):
        GradientCheckpointing(mode, compiles=False, attention=SDPA_KERNEL)
    by_compiler = GradientCheckpointing("selective", compiles=True, attention=SDPA_KERNEL)
    assert not by_compiler.covers_block(0), "the compiler does it by itself"
