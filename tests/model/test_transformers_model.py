"""A model of transformers behind our interface is that model: same loss, same gradients, no mask, no cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2PreTrainedModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from smoltrain.config.load import load_config
from smoltrain.config.schema import ModelSection, TransformersSection
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.model.build import build_model, count_parameters, model_attention_dropout
from smoltrain.model.decoder import Decoder
from smoltrain.model.transformers_model import HuggingFaceModel
from tests import tiny
from tests.engine import test_engine
from tests.engine.test_engine import engine_losses, furthest, plain_losses
from tests.models import assert_cache_changes_nothing, build_with
from tests.ranks import world

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.15}
WIDE = {"intermediate_size": 48, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, **WIDE, "rope_theta": 5000.0, "tie_word_embeddings": True},
    "gpt2": {**SHAPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {**SHAPE, "intermediate_size": 48, "tie_word_embeddings": False},
    "gemma2": {**SHAPE, **WIDE, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0},
}
# The same, in the words of each class.
PLAIN: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {**SHAPE, **WIDE, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
        | {"max_position_embeddings": 24, "tie_word_embeddings": True},
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "initializer_range": 0.15}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {**SHAPES["gpt_neox"], "max_position_embeddings": 24}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**SHAPES["gemma2"], "max_position_embeddings": 24}),
}
CPMANT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48}
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def section(model_type: str, **changes: Any) -> TransformersSection:
    shape = {**SHAPES.get(model_type, {}), **changes}
    return TransformersSection(
        kind="transformers", model_type=model_type, vocab_size=61, max_position_embeddings=24, config=shape
    )


def built(model_type: str, *, seed: int = 0, options: dict[str, Any] | None = None, **changes: Any) -> HuggingFaceModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_with(section(model_type, **changes), **options or {})
    assert isinstance(model, HuggingFaceModel)
    return model


def text(rows: int = 2, tokens: int = 20) -> Tensor:
    """One token more than a row, as the labels are shifted; id 0 among them, which some classes take for padding."""
    ids = torch.randint(61, (rows, tokens + 1), generator=torch.Generator().manual_seed(1))
    ids[:, ::5] = 0
    return ids


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- the same numbers


@pytest.mark.parametrize("model_type", SHAPES)
def test_loss_and_gradients_are_those_of_plain_transformers(model_type: str):
    ours = built(model_type)
    model_class, config_class, shape = PLAIN[model_type]
    theirs = model_class(config_class(vocab_size=61, **shape, **IDS))
    theirs.load_state_dict({name.removeprefix("inner."): x for name, x in ours.state_dict().items()})
    ids = text()
    ignored = ids.clone()
    ignored[0, 1:3] = -100
    loss = ours(ids[:, :-1], ignored[:, 1:])
    wanted = theirs(ids, labels=ignored).loss * 38  # a mean over the 2 x 20 - 2 valid labels, shifted by transformers
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    truth = gradients(theirs)
    assert {f"inner.{name}" for name in truth} == set(gradients(ours)) == set(dict(ours.named_parameters()))
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, truth[name.removeprefix("inner.")], rtol=1e-4, atol=1e-4)


def test_our_decoder_and_their_llama_are_one_function():
    theirs = built("llama")
    shape = {**SHAPES["llama"], "vocab_size": 61, "max_position_embeddings": 24}
    ours = build_model(ModelSection.model_validate(shape))
    assert isinstance(ours, Decoder)
    ours.load_state_dict({n.removeprefix("inner.model."): p for n, p in theirs.named_parameters()})
    ids, losses = text(), []
    for model in (ours, theirs):
        losses.append(model(ids[:, :-1], ids[:, 1:]))
        (losses[-1] / 40).backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert len(gradients(ours)) == len(gradients(theirs))
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradients(theirs)[f"inner.model.{name}"], gradient, rtol=0, atol=1e-5)


def test_the_padding_id_of_a_class_is_a_token_like_any_other():
    assert Gemma2Config().pad_token_id == 0
    model = built("gemma2", tie_word_embeddings=False)
    ids = text()
    model(ids[:, :-1], ids[:, 1:]).backward()
    table = model.inner.get_input_embeddings().weight
    assert table[0].any()
    assert table.grad[0].any()


def test_weights_depend_on_the_seed_alone():
    first, again, other = built("llama"), built("llama"), built("llama", seed=1)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in first.state_dict().items())
    assert not torch.equal(first.inner.lm_head.weight, other.inner.lm_head.weight)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert first.training


def test_the_recipe_has_the_published_number_of_parameters():
    recipe = load_config("smollm2-135m-hf").model
    assert count_parameters(build_with(recipe, device="meta", gradient_checkpointing="full")) == 134_515_008


@pytest.mark.parametrize("model_type", SHAPES)
def test_meta_counts_what_is_built(model_type: str):
    assert count_parameters(build_model(section(model_type), device="meta")) == count_parameters(built(model_type))


def test_gradient_checkpointing_changes_no_number():
    runs, ids = [], text()
    for mode in ("none", "full"):
        model = built("llama", options={"gradient_checkpointing": mode}, attention_dropout=0.2)
        calls: list[int] = []
        for i, block in enumerate(model.inner.model.layers):
            block.mlp.register_forward_pre_hook(lambda module, args, i=i, calls=calls: calls.append(i))
        with torch.random.fork_rng():
            torch.manual_seed(3)  # the dropout masks
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
        runs.append((loss, gradients(model), calls))
    (plain, plain_gradients, once), (loss, grads, twice) = runs
    assert torch.equal(loss, plain)
    assert all(torch.equal(grads[name], x) for name, x in plain_gradients.items())
    assert (once, twice) == ([0, 1, 2], [0, 1, 2, 2, 1, 0])


# ---- packing


def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def test_transformers_masks_packed_documents_only_without_mask_and_without_cache():
    """The trap that our forward keeps away from: positions that begin anew mask only if nothing else is passed."""
    theirs = built("llama").eval().inner
    first, second = text(1, 8), text(1, 6).flip(1)
    row, positions = torch.cat((first, second), 1), torch.cat((torch.arange(9), torch.arange(7)))[None]
    alone = logits_of(theirs, second, use_cache=False)

    def second_document(**options: Any) -> Tensor:
        return logits_of(theirs, row, position_ids=positions, **options)[:, 9:]

    torch.testing.assert_close(second_document(use_cache=False), alone, rtol=0, atol=1e-5)
    for options in ({}, {"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(row)}):
        assert (second_document(**options) - alone).abs().max() > 0.1, f"{options}: this version masks after all"


@pytest.mark.parametrize("training", [True, False])
def test_a_row_is_one_text_to_the_model_and_neither_mask_nor_cache_is_passed(training: bool):
    model, ids = built("llama").train(training), text()
    passed: list[dict[str, Any]] = []
    model.inner.register_forward_pre_hook(lambda module, args, kwargs: passed.append(kwargs), with_kwargs=True)
    made: list[Any] = []
    model.inner.register_forward_hook(lambda module, args, out: made.append(out.past_key_values))
    loss, logits = model(ids[:, :-1], ids[:, 1:]), model(ids[:, :-1])
    for kwargs in passed:
        assert set(kwargs) == {"input_ids", "use_cache", "return_dict"}
        assert kwargs["use_cache"] is False
    assert made == [None, None]
    mask = torch.ones(20, 20).tril().log()[None, None].expand(2, 1, 20, 20)  # causal, by hand: 0 or -inf
    truth = logits_of(model.inner, ids[:, :-1], attention_mask=mask, use_cache=False)
    torch.testing.assert_close(logits, truth, rtol=0, atol=1e-5)
    want = torch.nn.functional.cross_entropy(truth.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, want)


# ---- the cache


@pytest.mark.parametrize("model_type", [*SHAPES, "openai-gpt"])  # the last keeps no keys and values at all
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 5, 1, 6]], ids=["single", "mixed"])
def test_the_cache_changes_nothing(model_type: str, pieces: list[int]):
    shape = SHAPE if model_type == "openai-gpt" else {}
    model, ids = built(model_type, **shape).eval(), text()[:, :20]
    assert model.uses_cache == (model_type in SHAPES)
    assert_cache_changes_nothing(model, ids, pieces)


def test_a_cache_that_raises_is_not_used():
    model, ids = built("jamba", **SHAPE, **WIDE).eval(), text()[:, :20]  # three layers, none of them attention
    assert model.cache_argument is not None
    assert not model.uses_cache
    assert_cache_changes_nothing(model, ids, [9, 1, 1, 9])


def test_a_cache_that_forgets_is_not_used(monkeypatch: pytest.MonkeyPatch):
    def forget(self: Any, input_ids: Any, past_key_values: Any = None, **options: Any) -> Any:
        return real(self, input_ids, **options)

    real = GPT2LMHeadModel.forward
    monkeypatch.setattr(GPT2LMHeadModel, "forward", forget)
    assert_cache_changes_nothing(built("gpt2").eval(), text()[:, :20], [9, 1, 1, 9])


@pytest.mark.parametrize("model_type", SHAPES)
def test_a_prefill_makes_the_last_logits_only(model_type: str):
    model, made = built(model_type).eval(), []
    model.inner.register_forward_hook(lambda module, args, out: made.append(out.logits.shape))
    model(text()[:, :9], cache=model.new_cache(2, 20), last_only=True)
    assert made == [(2, 1, 61)]


# ---- tied weights


def test_a_tied_table_is_one_tensor_and_survives_a_file(tmp_path: Path):
    model = built("llama")
    own = dict(model.named_parameters())
    assert set(dict(model.named_parameters(remove_duplicate=False))) - set(own) == {"inner.lm_head.weight"}
    save_file({name: p.detach() for name, p in own.items()}, tmp_path / "model.safetensors")
    other = built("llama", seed=1)
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (missing, unexpected) == (["inner.lm_head.weight"], [])
    assert torch.equal(other(text()), model(text()))


# ---- kernels


@pytest.mark.parametrize(("kernel", "name"), [("sdpa", "sdpa"), ("math", "eager")])
def test_the_kernel_is_obeyed(kernel: Any, name: str):
    assert built("llama", options={"attention": AttentionKernel(kernel, "")}).inner.config._attn_implementation == name


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("flash_attn", "flash_attention_2"),
        ("flash_attn_interface", "flash_attention_3"),
        ("flash_attn.cute", "flash_attention_4"),
    ],
)
def test_flash_attention_is_asked_for_by_its_version(monkeypatch: pytest.MonkeyPatch, package: str, name: str):
    asked: list[str] = []

    def take(model: Any, implementation: str) -> None:
        asked.append(implementation)
        model.config._attn_implementation_internal = implementation

    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", take)
    model = built("llama", options={"attention": AttentionKernel("flash-attn", "", print, package=package)})
    assert asked == [name] == [model.inner.config._attn_implementation]


@pytest.mark.parametrize(
    ("model_type", "kernel", "want"),
    [("gemma2", "sdpa", "math"), ("llama", "flash-attn", "sdpa or math"), ("openai-gpt", "flash-attn", "sdpa or math")],
)
def test_a_kernel_that_the_class_lacks_is_refused(model_type: str, kernel: Any, want: str):
    with pytest.raises(UserError, match="cannot run on the kernel") as error:
        built(model_type, options={"attention": AttentionKernel(kernel, "", print, package="flash_attn")})
    (problem,) = error.value.problems
    assert (problem.want, problem.change) == (want, "engine.attention")


def test_capped_scores_are_not_left_to_sdpa_though_transformers_would(monkeypatch: pytest.MonkeyPatch):
    """As 5.17 would, which then leaves the cap off and says nothing of it."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    kernel = AttentionKernel("sdpa", "")
    with pytest.raises(UserError, match="cannot run on the kernel"):
        built("gemma2", options={"attention": kernel})
    uncapped = built("gemma2", options={"attention": kernel}, attn_logit_softcapping=None)
    assert uncapped.inner.config._attn_implementation == "sdpa"


def test_the_dropout_of_attention_is_found_under_any_name():
    ours = ModelSection.model_validate(
        {**SHAPES["llama"], "vocab_size": 61, "max_position_embeddings": 24} | {"attention_dropout": 0.3}
    )
    assert model_attention_dropout(ours) == 0.3
    assert model_attention_dropout(section("llama", attention_dropout=0.2)) == 0.2
    assert model_attention_dropout(section("llama")) == 0.0
    assert model_attention_dropout(section("gpt2", attn_pdrop=0.1)) == 0.1


# ---- mistakes


@pytest.mark.parametrize(
    ("model_type", "changes", "said", "change"),
    [
        ("lama", {}, "no such model_type: saw 'lama', want 'llama'", "model.model_type"),
        ("vit", {}, "without a causal language model", "model.model_type"),
        ("gemma3", {}, "takes no vocab_size", "model.model_type"),
        ("llama", {"hiden_size": 32}, "want 'hidden_size' (the nearest", "model.config.hiden_size"),
        ("gpt2", {"rope_theta": 1.0}, "unknown key model.config.rope_theta", "model.config.rope_theta"),
        ("llama", {"hidden_size": "wide"}, "expected int, got str (value: 'wide')", "model.config.hidden_size"),
        ("llama", {"hidden_size": 34}, "not a multiple of the number of attention heads", "model.config"),
        ("llama", {"hidden_act": "sillu"}, "KeyError: 'sillu'", "model.config"),
        ("gpt2", {"n_positions": 24}, "n_positions is said twice", "model.config.n_positions"),
        ("gpt2", {"n_embd": 32}, "n_embd is said twice", "model.config.n_embd"),
        ("llama", {"dtype": "bfloat16"}, "want engine.precision", "model.config.dtype"),
        ("mixtral", {"output_router_logits": True}, "cross entropy alone", "model.config.output_router_logits"),
        ("bert", SHAPE, "bert sees the future", "model.config"),
        ("cpmant", CPMANT, "cpmant sees the future", "model.config"),  # but nothing where ids are 0, its padding
    ],
)
def test_a_mistake_is_one_readable_line(model_type: str, changes: dict[str, Any], said: str, change: str):
    with pytest.raises(UserError) as error:
        built(model_type, **changes)
    (problem,) = error.value.problems
    assert said in str(problem)
    assert problem.change == change
    assert "\n" not in str(problem)


def test_mistakes_are_told_together_and_on_meta_too():
    with pytest.raises(UserError) as error:
        build_model(section("llama", hiden_size=1, n_layers=2, dtype="float16"), device="meta")
    assert len(error.value.problems) == 3


def test_a_class_without_gradient_checkpointing_is_refused():
    with pytest.raises(UserError, match=r"engine\.gradient_checkpointing"):
        build_with(section("openai-gpt", **SHAPE), device="meta", gradient_checkpointing="full")


# ---- under DeepSpeed, on two real ranks

TINY = (
    "model={kind: transformers, model_type: llama, vocab_size: 320, max_position_embeddings: 64}",
    "model.config={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}",
    "model.config.intermediate_size=64",
    "model.config.tie_word_embeddings=true",
    "engine.ds_config=zero2",
)


@pytest.mark.slow
def test_zero_2_trains_it_as_plain_torch_does(tmp_path: Path, ranks: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(test_engine, "STEPS", 3)
    settings = tiny.load(tmp_path, *TINY, "engine.precision=fp32", "engine.gradient_checkpointing=full")
    prepare_run_data(settings)
    expected, expected_norms, expected_weights = plain_losses(settings, bf16=False, size=2)
    for losses, norms, weights in ranks(2).run(engine_losses, settings, "fp32", 3):
        assert losses == pytest.approx(expected, abs=1e-6)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert furthest(weights, expected_weights) < 1e-5
    assert expected[-1] < expected[0] - 0.01


def dtypes(settings: Any) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of the parameters and of the buffers behind a bf16 engine; runs on every rank."""
    from smoltrain.engine.build_engine import build_engine

    wrapped = build_engine(build_model(settings.model), settings, world(), precision="bf16", accumulation=2)
    return {p.dtype for p in wrapped.module.parameters()}, {b.dtype for b in wrapped.module.buffers()}


@pytest.mark.slow
def test_rotary_frequencies_stay_in_fp32_behind_a_bf16_engine(tmp_path: Path, ranks: Any):
    """In bf16 they would be off by up to 0.4 %: 32 radians at position 8192."""
    for parameters, buffers in ranks(2).run(dtypes, tiny.load(tmp_path, *TINY)):
        assert (parameters, buffers) == ({torch.bfloat16}, {torch.float32})
