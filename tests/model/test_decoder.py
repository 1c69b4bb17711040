"""The decoder equals independent implementations, holds the published numbers of parameters, and is causal."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from smoltrain.config.schema import ModelSection
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.compile import missing_for_compile
from smoltrain.kernels.cpu_dropout import FastDropout
from smoltrain.model.decoder import Decoder, _run_blocks_and_norm, _run_decoder_block, build_decoder
from smoltrain.model.interface import ComputeOptions
from tests.model.tiny_decoders import (
    GPT2,
    LLAMA,
    NEOX,
    Tensors,
    batch,
    built,
    decoder,
    gradients,
    loss_and_gradients,
    section,
)
from tests.models import assert_cache_changes_nothing

# Our names and layouts -> those of transformers. Each map is linear, so it carries weights and gradients alike.


def as_llama(ours: Tensors) -> Tensors:
    return {name if name.startswith("lm_head") else f"model.{name}": x for name, x in ours.items()}


def as_gpt2(ours: Tensors) -> Tensors:
    theirs = {
        "transformer.wte.weight": ours["embed_tokens.weight"],
        "transformer.wpe.weight": ours["embed_positions.weight"],
    }
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"] = ours[f"norm.{kind}"]
        for i in range(3):
            us, them = f"layers.{i}", f"transformer.h.{i}"
            theirs[f"{them}.ln_1.{kind}"] = ours[f"{us}.input_layernorm.{kind}"]
            theirs[f"{them}.ln_2.{kind}"] = ours[f"{us}.post_attention_layernorm.{kind}"]
            qkv = torch.cat([ours[f"{us}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
            linears = {"attn.c_attn": qkv, "attn.c_proj": ours[f"{us}.self_attn.o_proj.{kind}"]}
            linears |= {"mlp.c_fc": ours[f"{us}.mlp.up_proj.{kind}"], "mlp.c_proj": ours[f"{us}.mlp.down_proj.{kind}"]}
            theirs |= {f"{them}.{name}.{kind}": x.T if x.dim() == 2 else x for name, x in linears.items()}  # Conv1D
    return theirs


def as_neox(ours: Tensors) -> Tensors:
    theirs = {"gpt_neox.embed_in.weight": ours["embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        theirs[f"gpt_neox.final_layer_norm.{kind}"] = ours[f"norm.{kind}"]
        for i in range(3):
            for name in ("input_layernorm", "post_attention_layernorm"):
                theirs[f"gpt_neox.layers.{i}.{name}.{kind}"] = ours[f"layers.{i}.{name}.{kind}"]
    for i in range(3):
        us, them = f"layers.{i}", f"gpt_neox.layers.{i}"
        heads = [ours[f"{us}.self_attn.{p}_proj.weight"].unflatten(0, (4, -1)) for p in "qkv"]
        theirs[f"{them}.attention.query_key_value.weight"] = torch.stack(heads, 1).flatten(0, 2)  # q, k, v per head
        theirs[f"{them}.attention.dense.weight"] = ours[f"{us}.self_attn.o_proj.weight"]
        theirs[f"{them}.mlp.dense_h_to_4h.weight"] = ours[f"{us}.mlp.up_proj.weight"]
        theirs[f"{them}.mlp.dense_4h_to_h.weight"] = ours[f"{us}.mlp.down_proj.weight"]
    return theirs


def llama(s: ModelSection) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=s.vocab_size,
            hidden_size=s.hidden_size,
            num_hidden_layers=s.num_hidden_layers,
            num_attention_heads=s.num_attention_heads,
            num_key_value_heads=s.num_key_value_heads,
            intermediate_size=s.intermediate_size,
            max_position_embeddings=s.max_position_embeddings,
            rms_norm_eps=s.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
            tie_word_embeddings=s.tie_word_embeddings,
            attention_bias=s.attention_bias,
            mlp_bias=s.mlp_bias,
        )
    )


def gpt2(s: ModelSection) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=s.vocab_size,
            n_embd=s.hidden_size,
            n_layer=s.num_hidden_layers,
            n_head=s.num_attention_heads,
            n_inner=s.intermediate_size,
            n_positions=s.max_position_embeddings,
            layer_norm_epsilon=s.rms_norm_eps,
            activation_function="gelu_new",
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def neox(s: ModelSection) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=s.vocab_size,
            hidden_size=s.hidden_size,
            num_hidden_layers=s.num_hidden_layers,
            num_attention_heads=s.num_attention_heads,
            intermediate_size=s.intermediate_size,
            max_position_embeddings=s.max_position_embeddings,
            layer_norm_eps=s.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta, "partial_rotary_factor": 1.0},
            hidden_act="gelu_new",
            use_parallel_residual=False,
            tie_word_embeddings=s.tie_word_embeddings,
        )
    )


@pytest.mark.parametrize(
    ("shape", "changes", "transformer", "rename"),
    [
        (LLAMA, {}, llama, as_llama),
        (LLAMA, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, llama, as_llama),
        (LLAMA, {"num_key_value_heads": 1, "rope_theta": 100000.0, "rms_norm_eps": 1e-3}, llama, as_llama),
        (GPT2, {}, gpt2, as_gpt2),
        (NEOX, {}, neox, as_neox),
    ],
    ids=["llama", "llama-untied-biases", "llama-mqa", "gpt2", "neox"],
)
def test_logits_and_gradients_equal_those_of_transformers(
    shape: dict[str, Any],
    changes: dict[str, Any],
    transformer: Callable[[ModelSection], Any],
    rename: Callable[[Tensors], Tensors],
):
    ours = decoder(shape, **changes).eval()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():  # large enough that every part matters; norms and biases off their initial values
        for p in ours.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    theirs = transformer(ours.section).eval()
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("bias"):
                p.zero_()  # NeoX has biases that we do not
    missing = theirs.load_state_dict(rename(ours.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("bias") or name == "lm_head.weight" for name in missing.missing_keys)

    ids, labels = batch()
    valid = (labels != -100).sum()
    logits = ours(ids)
    wanted = theirs(ids, use_cache=False).logits
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    (ours(ids, labels) / valid).backward()
    F.cross_entropy(wanted.flatten(0, 1), labels.flatten()).backward()
    mapped, truth = rename(gradients(ours)), gradients(theirs)
    assert len(gradients(ours)) == len(list(ours.parameters()))
    for name, gradient in mapped.items():
        torch.testing.assert_close(gradient, truth[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_parameter_names_are_those_of_llama():
    ours = as_llama(decoder(LLAMA).state_dict())
    theirs = llama(section(LLAMA)).state_dict()
    assert set(theirs) - set(ours) == {"lm_head.weight"}  # tied there, absent here
    assert {name: x.shape for name, x in ours.items()} == {name: theirs[name].shape for name in ours}


def test_weights_depend_on_the_seed_alone():
    first, again, other = decoder(GPT2), decoder(GPT2), decoder(GPT2, seed=1)
    for name, x in first.state_dict().items():
        assert torch.equal(x, again.state_dict()[name])
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_initial_weights_are_as_published():
    wide: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "initializer_range": 0.05,
    }
    for name, x in decoder(GPT2, **wide).named_parameters():
        if name.endswith("bias"):
            assert not x.any(), name
        elif x.dim() == 1:
            assert (x == 1).all(), name
        else:
            std = 0.05 / 4 if "o_proj" in name or "down_proj" in name else 0.05  # sqrt(2 * 8 blocks) = 4
            assert x.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(x.mean().item()) < 4 * std / x.numel() ** 0.5, name


def test_the_first_loss_is_that_of_a_uniform_guess():
    ids, labels = batch()
    loss = decoder(LLAMA)(ids, labels) / (labels != -100).sum()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.log(torch.tensor(61.0)).item(), abs=0.05)


def test_the_loss_is_that_of_the_logits():
    model, (ids, labels) = decoder(LLAMA), batch()
    want = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels), want)


@pytest.mark.parametrize("shape", [LLAMA, GPT2, NEOX], ids=["llama", "gpt2", "neox"])
def test_no_token_sees_a_later_one(shape: dict[str, Any]):
    model, (ids, _) = decoder(shape, initializer_range=0.3).eval(), batch()
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 61
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.isclose(before[:, 12:], after[:, 12:]).all(-1).any()


@pytest.mark.parametrize("shape", [LLAMA, GPT2, NEOX], ids=["llama", "gpt2", "neox"])
@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 5, 1, 6], [20]], ids=["single", "mixed", "whole"])
def test_the_cache_changes_nothing(shape: dict[str, Any], kernel: Literal["sdpa", "math"], pieces: list[int]):
    model = built(section(shape, initializer_range=0.15), attention=AttentionKernel(kernel, "test")).eval()
    ids, _ = batch()
    assert_cache_changes_nothing(model, ids, pieces)


@pytest.mark.skipif(
    missing_for_compile("cpu") is not None, reason="torch.compile needs a compiler; test_compile.py: then it is off"
)
@pytest.mark.parametrize(("shape", "mode", "region", "fused"), [
    (LLAMA, "full", "block", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (LLAMA, "none", "block", False), (LLAMA, "selective", "block", True),
        (GPT2, "none", "block", False), (GPT2, "full", "block", True),
        (LLAMA, "none", "model", True), (GPT2, "full", "model", False),
    )),
])  # fmt: skip
def test_compiled_blocks_compute_what_they_say(shape: dict[str, Any], mode: str, region: str, fused: bool):
    runs = []
    for compiles in (False, True):
        model = built(
            section(shape, initializer_range=0.1), compiles=compiles, gradient_checkpointing=mode,
            attention=AttentionKernel("blocked", "test"), compile_region=region, fused_projections=compiles and fused,
        )  # fmt: skip
        runs.append(loss_and_gradients(model))
    (a, grads_a), (b, grads_b) = runs
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    for name, x in grads_a.items():
        torch.testing.assert_close(x, grads_b[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mode", ["full", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("none", "selective", 2))]
)
def test_all_blocks_as_one_region_are_one_graph_and_the_same_numbers(mode: Any, monkeypatch: pytest.MonkeyPatch):
    """Traced and differentiated as ever, run by torch's own kernels: bit for bit, dropout too."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(_run_blocks_and_norm.function, dynamic=False, backend=counter)
    monkeypatch.setitem(_run_blocks_and_norm.__dict__, "compiled", whole)
    shape = section(LLAMA, initializer_range=0.1, dropout=0.2, attention_dropout=0.2)
    runs = []
    for compiles in (False, True):
        model = built(
            shape, compiles=compiles, compile_region="model", gradient_checkpointing=mode,
            attention=AttentionKernel("blocked", "test"),
        )  # fmt: skip
        runs.append(loss_and_gradients(model))
    (loss, gradients_of_blocks), (loss_of_region, gradients_of_region) = runs
    assert torch.equal(loss, loss_of_region)
    assert gradients_of_blocks.keys() == gradients_of_region.keys()
    assert all(torch.equal(x, gradients_of_region[name]) for name, x in gradients_of_blocks.items())
    assert counter.frame_count == 1
    model.eval()  # validation is not compiled: its shapes would be more graphs
    model(*batch(rows=3))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("mode", "share"), [("none", 1.0), ("full", 0.15)])
def test_a_region_keeps_what_its_blocks_would(mode: Any, share: float, monkeypatch: pytest.MonkeyPatch):
    """Bytes that the backward pass of 8 blocks keeps: gradient checkpointing saves as much within one region."""
    kept = []
    for region, function in (("block", _run_decoder_block), ("model", _run_blocks_and_norm)):
        compiled = torch.compile(function.function, dynamic=False, backend="aot_eager_decomp_partition")
        monkeypatch.setitem(function.__dict__, "compiled", compiled)
        model = built(
            section(LLAMA, num_hidden_layers=8), compiles=True, compile_region=region, gradient_checkpointing=mode,
            attention=AttentionKernel("blocked", "test"),
        )  # fmt: skip
        kept.append(_kept_bytes(model))
    of_blocks, of_region = kept
    assert of_region <= of_blocks
    assert of_blocks <= share * 620_000


def _kept_bytes(model: Decoder) -> int:
    weights = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(*batch())
    return sum(x.nbytes for x in kept.values())


@pytest.mark.skipif(
    missing_for_compile("cpu") is not None, reason="torch.compile needs a compiler; test_compile.py: then it is off"
)
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_dropout_is_the_same_for_the_same_random_state(mode: str):
    options = {"compiles": True, "gradient_checkpointing": mode, "attention": AttentionKernel("blocked", "test")}
    model = built(section(LLAMA, dropout=0.2, attention_dropout=0.2), **options)
    loss, first = loss_and_gradients(model)
    model.zero_grad()
    again, second = loss_and_gradients(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(first[name], x) for name, x in second.items())
    plain = built(section(LLAMA), compiles=True, attention=AttentionKernel("blocked", "test"))
    assert not torch.equal(loss, loss_and_gradients(plain)[0])


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_fused_projections_are_the_same_model(shape: dict[str, Any], mode: str):
    """Of the same first weights under the same names, for the same random state; selective keeps their outputs too."""
    attention = AttentionKernel("sdpa", "test")
    separate, fused = (
        built(
            section(shape, initializer_range=0.1),
            attention=attention,
            gradient_checkpointing=mode,
            fused_projections=on,
        )
        for on in (False, True)
    )
    weights = separate.state_dict()
    assert list(weights) == list(fused.state_dict())
    assert all(torch.equal(weight, weights[name]) for name, weight in fused.state_dict().items())
    (loss, grads), (expected, wanted) = loss_and_gradients(fused), loss_and_gradients(separate)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


def test_torchs_own_initial_values_are_never_made():
    """Nor is torch's compiler imported for that. All weights are `init_weights`' own, and the random state is."""
    wanted = section(LLAMA, norm="layernorm", mlp_bias=True)
    with torch.device("meta"):
        plain = Decoder(wanted, ComputeOptions())
    plain.to_empty(device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        plain.init_weights()
        drawn = torch.rand(1)
        torch.manual_seed(5)
        ours = build_decoder(wanted, ComputeOptions(), "cpu")
        assert torch.equal(torch.rand(1), drawn)
    theirs = plain.state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs[name])


def test_the_kernels_agree():
    runs = []
    for name in ("sdpa", "math"):
        model = built(section(LLAMA, initializer_range=0.1), attention=AttentionKernel(name, "test"))
        runs.append(loss_and_gradients(model))
    (a, grads_a), (b, grads_b) = runs
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for name, x in grads_a.items():
        torch.testing.assert_close(x, grads_b[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(kind: str):
    model, (ids, _) = decoder({**LLAMA, kind: 0.3}), batch()
    plain = decoder(LLAMA)
    with torch.random.fork_rng():
        assert not torch.equal(model(ids), model(ids))
        assert torch.equal(model.eval()(ids), plain(ids))


def test_dropout_sits_on_embeddings_and_both_branches():
    model = decoder(LLAMA, dropout=0.1)
    acted: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, FastDropout):
            module.register_forward_hook(lambda m, args, out, name=name: acted.append(name))
    with torch.random.fork_rng():
        model(batch()[0])
    assert acted == ["dropout"] + [f"layers.{i}.dropout" for i in range(3) for _ in range(2)]


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_table_is_that_of_all_its_uses(tied: bool):
    """On a CPU the look-up's part of a tied table is sparse until it meets the head's."""
    model, (ids, labels) = decoder(LLAMA, tie_word_embeddings=tied).double(), batch()
    ids[:, :5] = 7  # a word that comes again and again
    model(ids, labels).backward()
    table, gradient = model.embed_tokens.weight, model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient.layout == torch.strided
    nudge = torch.zeros_like(table)
    for word in (7, int(labels[0, 3])):
        nudge[word, 1] = 1e-6
        with torch.no_grad():
            table += nudge
            above = model(ids, labels)
            table -= 2 * nudge
            below = model(ids, labels)
            table += nudge
        assert float(above - below) / 2e-6 == pytest.approx(float(gradient[word, 1]), rel=1e-4), word
        nudge.zero_()


def test_a_bf16_model_is_near_its_fp32_self():
    (ids, labels), model = batch(), decoder(LLAMA)
    exact = model(ids, labels)
    rough = model.bfloat16()(ids, labels)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-3, atol=0)
