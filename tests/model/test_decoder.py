"""The decoder equals independent implementations, holds the published numbers of parameters, and is causal."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from smoltrain.config.schema import ModelSection
from smoltrain.kernels import cpu_attention
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.compile import missing_for_compile
from smoltrain.kernels.cpu_dropout import FastDropout
from smoltrain.model.build import build_model, count_parameters
from smoltrain.model.decoder import Decoder
from smoltrain.model.layers import apply_rotary, compute_rotary_angles
from smoltrain.model.recompute import ATEN, _selective_policy
from tests.models import build_with

Tensors = dict[str, Tensor]

LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
NEOX: dict[str, Any] = {**LLAMA, "num_key_value_heads": 4, "norm": "layernorm", "mlp": "gelu"}
GPT2: dict[str, Any] = {**NEOX, "positions": "learned", "attention_bias": True, "mlp_bias": True}


def section(shape: dict[str, Any], **changes: Any) -> ModelSection:
    return ModelSection.model_validate({**shape, **changes})


def built(section: ModelSection, *, seed: int = 0, **options: Any) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = build_with(section, **options)
    assert isinstance(model, Decoder)
    return model


def decoder(shape: dict[str, Any], *, seed: int = 0, **changes: Any) -> Decoder:
    return built(section(shape, **changes), seed=seed)


def batch(rows: int = 2, tokens: int = 20) -> tuple[Tensor, Tensor]:
    """Ids and labels, two of which are ignored."""
    drawn = torch.randint(61, (2, rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = drawn[1].clone()
    labels[0, :2] = -100
    return drawn[0], labels


def gradients(model: torch.nn.Module) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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


# The shapes of the five published systems.
SMOLLM = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM |= {"num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192}
SMALL = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 3072}
SYSTEMS: dict[str, tuple[dict[str, Any], int]] = {
    "shakespeare-80m": (
        {**GPT2, **SMALL, "vocab_size": 49152, "num_hidden_layers": 6, "max_position_embeddings": 128},
        80_375_808,
    ),
    "smollm2-135m": (SMOLLM, 134_515_008),
    "smollm2-124m": (
        {**NEOX, **SMALL, "vocab_size": 50258, "num_hidden_layers": 12, "max_position_embeddings": 2048},
        123_571_200,
    ),
    "smollm2-135m-hf": (SMOLLM, 134_515_008),
    "smollm-149m-mha": (
        {**SMOLLM, "vocab_size": 50304, "num_key_value_heads": 9}
        | {"positions": "learned", "max_position_embeddings": 2048},
        149_629_248,
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_five_systems_have_their_parameters(name: str):
    shape, parameters = SYSTEMS[name]
    assert count_parameters(build_model(section(shape), device="meta")) == parameters


def test_untying_adds_one_table():
    tied, untied = decoder(LLAMA), decoder(LLAMA, tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 61 * 32
    assert "lm_head.weight" in untied.state_dict()
    assert "lm_head.weight" not in tied.state_dict()


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
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], 1)
        torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-5)
        last = model(ids[:, :9], cache=(again := model.new_cache(2, 20)), last_only=True)
        torch.testing.assert_close(last, logits[:, 8:9], rtol=0, atol=1e-5)
    assert (cache.length, again.length) == (20, 9)


def loss_and_gradients(model: Decoder) -> tuple[Tensor, Tensors]:
    ids, labels = batch()
    with torch.random.fork_rng():
        torch.manual_seed(3)  # the dropout masks
        loss = model(ids, labels)
        loss.backward()
    return loss.detach(), gradients(model)


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


def test_selective_keeps_matrix_products():
    operations = (ATEN.mm.default, ATEN.addmm.default, ATEN.silu.default, ATEN.mul.Tensor)
    kept = [op for op in operations if _selective_policy(None, op) == CheckpointPolicy.MUST_SAVE]
    assert kept == [ATEN.mm.default, ATEN.addmm.default]


@pytest.mark.skipif(
    bool(missing_for_compile("cpu")), reason="torch.compile needs a compiler; test_compiling.py: then it is off"
)
@pytest.mark.parametrize(("shape", "mode"), [
    (LLAMA, "full"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (LLAMA, "none"), (LLAMA, "selective"), (GPT2, "none"), (GPT2, "full"),
    )),
])  # fmt: skip
def test_compiled_blocks_compute_what_they_say(shape: dict[str, Any], mode: str):
    runs = []
    for compiles in (False, True):
        model = built(
            section(shape, initializer_range=0.1), compiles=compiles, gradient_checkpointing=mode,
            attention=AttentionKernel("blocked", "test"),
        )  # fmt: skip
        runs.append(loss_and_gradients(model))
    (a, grads_a), (b, grads_b) = runs
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    for name, x in grads_a.items():
        torch.testing.assert_close(x, grads_b[name], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    bool(missing_for_compile("cpu")), reason="torch.compile needs a compiler; test_compiling.py: then it is off"
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


def test_positions_stay_exact_in_a_bf16_model():
    model = decoder(LLAMA, max_position_embeddings=8192).bfloat16()
    assert not list(model.buffers())  # nothing that a cast, a checkpoint or DeepSpeed could round
    positions = torch.arange(8192)
    cos, sin = compute_rotary_angles(positions, 64, 10000.0)
    angles = positions.double()[:, None] / 10000.0 ** (torch.arange(0, 64, 2).double() / 64)
    assert cos.dtype == torch.float32
    assert (cos - angles.cos()).abs().max() < 1e-3  # fp32 angles near 8192 are this fine; bf16 ones are off by 16
    assert (sin - angles.sin()).abs().max() < 1e-3
    assert model(batch()[0]).dtype == torch.bfloat16


def test_a_bf16_model_is_near_its_fp32_self():
    (ids, labels), model = batch(), decoder(LLAMA)
    exact = model(ids, labels)
    rough = model.bfloat16()(ids, labels)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-3, atol=0)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        a, b = (
            apply_rotary(x[None], compute_rotary_angles(torch.tensor([p]), 16, 10000.0)) for x, p in ((q, i), (k, j))
        )
        return float((a * b).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["rmsnorm", "layernorm"])
def test_norms_work_in_fp32_inside(shape: dict[str, Any]):
    layer = decoder(shape).norm
    x = 100 + torch.randn(4, 32, generator=torch.Generator().manual_seed(0))  # bf16 sums would lose the variance
    x = x.bfloat16()
    want = layer(x.float())
    torch.testing.assert_close(layer.bfloat16()(x).float(), want, rtol=2**-8, atol=1e-3)  # rounded once, at the end
