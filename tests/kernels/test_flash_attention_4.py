"""FlashAttention 4 as an operator: called by keywords, differentiated, kept by selective, one graph when compiled."""

import sys

import pytest
import torch
from torch import Tensor

from smoltrain.kernels.attention import AttentionKernel, PackedDocuments, causal_attention
from smoltrain.kernels.flash_attention import load_flash_attention
from smoltrain.kernels.flash_attention_4 import why_operators_do_not_fit
from tests.kernels.flash_packages import FakeInterface, pretend_gpu
from tests.kernels.test_attention import qkv
from tests.model.tiny_decoders import LLAMA, built, loss_and_gradients, section

MATH = AttentionKernel("math", "")


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> FakeInterface:
    pretend_gpu(monkeypatch, (10, 0), "flash_attn.cute")
    return sys.modules["flash_attn.cute.interface"]  # pyright: ignore[reportReturnType]


def kernel4() -> AttentionKernel:
    flash = load_flash_attention("flash_attn.cute", in_sdpa=True)
    return AttentionKernel("flash-attn", "", flash.rows, flash.documents, flash.package, operators=flash.operators)


def results(kernel: AttentionKernel, keys: int, positions: Tensor | None) -> list[Tensor]:
    q, k, v = qkv(6, keys)
    documents = None if positions is None else PackedDocuments.from_positions(positions, kernel, torch.float32)
    out = causal_attention(q, k, v, kernel, documents=documents)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.usefixtures("interface")
@pytest.mark.parametrize("positions", [None, torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]])])
@pytest.mark.parametrize("keys", [6, 8])
def test_it_is_the_definition_for_rows_and_for_documents(keys: int, positions: Tensor | None):
    if positions is not None and keys != 6:
        return  # a cache continues one text
    for ours, want in zip(results(kernel4(), keys, positions), results(MATH, keys, positions), strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mode", "forwards"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_does_not_compute_it_again(mode: str, forwards: int, interface: FakeInterface):
    model = built(section(LLAMA), gradient_checkpointing=mode, attention=kernel4())
    ours = loss_and_gradients(model)
    layers = len(model.layers)
    assert sorted(interface.calls) == ["backward"] * layers + ["forward"] * forwards * layers
    want = loss_and_gradients(built(section(LLAMA), attention=MATH))
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_its_fake_tensors_have_the_shapes_and_strides_of_the_true_ones(interface: FakeInterface):
    del interface
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in qkv(6, 6))
    for inputs in ((q, k, v, None, 0), (q[0], k[0], v[0], starts, 6)):
        torch.library.opcheck(torch.ops.smoltrain.flash_attention_4.default, inputs)
        out, lse = torch.ops.smoltrain.flash_attention_4(*inputs)
        given = [x.detach() for x in (out, *inputs[:3], out, lse)]
        backward = torch.ops.smoltrain.flash_attention_4_backward.default
        torch.library.opcheck(backward, (*given, *inputs[3:]), test_utils=("test_schema", "test_faketensor"))


def test_a_release_with_other_arguments_is_not_called(interface: FakeInterface, monkeypatch: pytest.MonkeyPatch):
    assert why_operators_do_not_fit() is None
    monkeypatch.setattr(FakeInterface, "_flash_attn_fwd", lambda self, q, k, v, causal, return_lse: q)
    said = "its _flash_attn_fwd takes no cu_seqlens_k, cu_seqlens_q, max_seqlen_k, max_seqlen_q"
    assert why_operators_do_not_fit() == said
    with pytest.raises(ValueError, match="takes no cu_seqlens_k"):
        load_flash_attention("flash_attn.cute", in_sdpa=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_a_compiled_block_is_one_graph_around_it(interface: FakeInterface):
    del interface
    inputs = qkv(6, 6)
    kernel = kernel4()
    compiled = torch.compile(lambda q, k, v: causal_attention(q, k, v, kernel), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    want = torch.autograd.grad(causal_attention(*inputs, MATH).square().sum(), inputs)
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)
