"""Models of transformers compute packed documents as if each were alone, or are refused."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers import modeling_flash_attention_utils as flash_utils

from smoltrain.errors import UserError
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.model.build import build_model
from smoltrain.model.transformers_model import HuggingFaceModel
from tests.model.test_documents import LAYOUT, assert_packed_is_alone, drawn, positions_of, varlen2
from tests.model.test_transformers_model import SHAPE, SHAPES, WIDE, built, section
from tests.models import build_with

MASKED: dict[str, Any] = {"document_mask": True}
SMALL: dict[str, dict[str, Any]] = {
    "jamba": {**SHAPE, **WIDE, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_d_conv": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("model_type", SHAPES)
@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("checkpointing", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_packed_documents_are_those_documents_one_by_one(
    model_type: str, kernel: Any, checkpointing: Literal["none", "full"]
):
    if model_type == "gemma2" and kernel == "sdpa":
        kernel = "math"  # it has no other
    options = {"attention": AttentionKernel(kernel, ""), "gradient_checkpointing": checkpointing, **MASKED}
    assert_packed_is_alone(built(model_type, options=options), LAYOUT)


def test_transformers_is_told_the_positions_and_neither_mask_nor_cache():
    model, (ids, labels), positions = built("llama"), drawn(LAYOUT), positions_of(LAYOUT)
    passed: list[dict[str, Any]] = []
    model.inner.register_forward_pre_hook(lambda module, args, kwargs: passed.append(kwargs), with_kwargs=True)
    model(ids, labels, positions_BT=positions)
    (kwargs,) = passed
    assert set(kwargs) == {"input_ids", "position_ids", "use_cache", "return_dict"}
    assert kwargs["position_ids"] is positions
    assert kwargs["use_cache"] is False
    with pytest.raises(AssertionError, match="not packed documents"):
        model(ids, cache=model.new_cache(4, 20), positions_BT=positions)


def test_the_check_leaves_weights_modes_and_random_numbers_alone():
    runs = []
    for options in ({}, MASKED):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_with(section("llama", attention_dropout=0.2), **options)
            runs.append((model.state_dict(), torch.get_rng_state()))
        assert model.training
    (weights, state), (checked, state_checked) = runs
    assert all(torch.equal(x, checked[name]) for name, x in weights.items())
    assert torch.equal(state, state_checked)


# ---- classes that cannot


@pytest.mark.parametrize(
    ("model_type", "device", "saw"),
    [
        ("bloom", "meta", "a forward of BloomForCausalLM without position_ids"),
        ("bloom", "cpu", "a forward of BloomForCausalLM without position_ids"),
        ("mamba", "meta", "a forward of MambaForCausalLM without position_ids"),
        ("openai-gpt", "cpu", "logits that depend on the document before"),  # positions are all that it begins anew
        ("opt", "cpu", "logits that depend on the document before"),
        ("jamba", "cpu", "logits that depend on the document before"),  # its attention is masked, its states are not
    ],
)
def test_a_class_that_mixes_documents_is_refused(model_type: str, device: str, saw: str):
    config = section(model_type, **SMALL.get(model_type, SHAPE))
    build_model(config, device=device)  # it is only the mask that it lacks
    with pytest.raises(UserError) as error:
        build_model(config, device=device, document_mask=True)
    (problem,) = error.value.problems
    assert problem.what == f"{model_type} cannot keep packed documents apart"
    assert (problem.saw.partition(", on ")[0], problem.change) == (saw, "packing.document_mask")
    assert "\n" not in str(problem)


def test_a_class_that_stumbles_over_positions_is_refused(monkeypatch: pytest.MonkeyPatch):
    forward = LlamaForCausalLM.forward

    def stumble(self: Any, input_ids: Any = None, position_ids: Any = None, **options: Any) -> Any:
        if position_ids is not None:
            raise ValueError("no positions, please\nat all")
        return forward(self, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", stumble)
    with pytest.raises(UserError, match="saw ValueError: no positions, please, want"):
        built("llama", options=MASKED)


# ---- FlashAttention, in whose place a stand-in follows its documentation


def blind(*args: Any, **options: Any) -> Tensor:
    """A varlen function that takes all tokens for one document."""
    q, k, v = args[:3]
    whole = torch.tensor([0, len(q)], dtype=torch.int32)
    return varlen2(q, k, v, whole, whole, len(q), len(q), causal=options["causal"])


KEPT_BY_TRANSFORMERS = (
    "_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn",
    "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn",
)  # fmt: skip


@pytest.fixture
def on_flash(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes transformers believe in flash-attn, with this varlen function in it; and a kernel that asks for it."""

    def install(varlen: Any) -> AttentionKernel:
        def whole(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            starts = torch.arange(len(q) + 1, dtype=torch.int32) * q.size(1)
            q1, k1, v1 = (x.flatten(0, 1) for x in (q, k, v))
            return varlen2(q1, k1, v1, starts, starts, q.size(1), q.size(1), causal=options["causal"]).view_as(q)

        def scaled(
            q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
            max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float = 0.0, causal: bool = False,
        ) -> Tensor:  # fmt: skip
            """With the words of the package: transformers sends those that it finds here."""
            assert softmax_scale == pytest.approx(q.size(-1) ** -0.5)  # the package's own default
            lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
            starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
            return varlen(q, k, v, **starts, **lengths, dropout_p=dropout_p, causal=causal)

        def take(model: Any, implementation: str) -> None:
            model.config._attn_implementation_internal = implementation

        monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", take)
        # What every version of transformers asks for the package's functions, and keeps beside their name.
        monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: (whole, scaled, None, None, None))
        for name, kept in list(vars(flash_utils).items()):
            if name in KEPT_BY_TRANSFORMERS:
                monkeypatch.setattr(flash_utils, name, None if name == "_loaded_implementation" else kept)
        return AttentionKernel("flash-attn", "test", print, package="flash_attn")

    return install


def test_flash_attention_is_told_where_documents_begin(on_flash: Any):
    seen: list[Tensor] = []

    def varlen(*args: Any, cu_seqlens_q: Tensor, **options: Any) -> Tensor:
        seen.append(cu_seqlens_q)
        return varlen2(*args, cu_seqlens_q=cu_seqlens_q, **options)

    model = built("llama", options={"attention": on_flash(varlen)})
    assert_packed_is_alone(model, LAYOUT)
    starts = [0, 20, 21, 22, 29, 40, 53, 59, *range(60, 81)]
    padded = [*starts, *[80] * (64 + 1 - len(starts))]  # of 80 tokens, with room for 64 documents
    assert {tuple(x.tolist()) for x in seen} == {tuple(padded)}
    assert len({x.data_ptr() for x in seen}) == 2  # one tensor for all blocks of each of the two runs

    # The trap: from positions alone, transformers finds no documents in a batch of several rows, and says nothing.
    ids, positions = drawn(LAYOUT)[0], positions_of(LAYOUT)
    trusting = model.inner(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert (trusting - model(ids, positions_BT=positions)).abs().max() > 0.1


def test_a_class_is_checked_on_flash_attention_too(on_flash: Any, monkeypatch: pytest.MonkeyPatch):
    went: list[tuple[Any, ...]] = []

    def to(model: HuggingFaceModel, *where: Any) -> HuggingFaceModel:
        went.append((model, *where))
        return model

    monkeypatch.setattr(HuggingFaceModel, "to", to)
    model = built("llama", options={"attention": on_flash(varlen2), **MASKED})
    (copied, *where), (returned, _) = went
    assert where == ["cuda", torch.bfloat16]
    assert copied is not model is returned  # bf16 would round the weights that are trained
    with pytest.raises(
        UserError, match=r"llama cannot keep packed documents apart: saw logits .* on flash_attention_2"
    ):
        built("llama", options={"attention": on_flash(blind), **MASKED})
