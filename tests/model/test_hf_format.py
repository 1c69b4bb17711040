"""What transformers reads is the decoder, both ways, and what the decoder cannot be is refused in a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from smoltrain.config.schema import ModelSection
from smoltrain.errors import UserError
from smoltrain.model.hf_config import GPT2, LLAMA, NEOX, SMOLTRAIN, hf_class_name
from smoltrain.model.hf_format import read_hf_decoder
from smoltrain.model.hf_weights import WEIGHT_INDEX
from tests import folders

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GQA, BIASES = {"num_key_value_heads": 2}, {"attention_bias": True, "mlp_bias": True}
LAYERNORM_GELU = {"norm": "layernorm", "mlp": "gelu"}
AS_GPT2 = {**LAYERNORM_GELU, **BIASES, "positions": "learned"}
SYSTEM_4 = {"positions": "learned"}  # with RMSNorm, SwiGLU and all heads: nobody else has it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (LLAMA, GQA),
    "llama-untied-biases": (LLAMA, {**BIASES, "tie_word_embeddings": False, "rope_theta": 500000.0}),
    "llama-mqa": (LLAMA, {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "gpt2": (GPT2, {**AS_GPT2, "dropout": 0.2, "attention_dropout": 0.1}),
    "neox": (NEOX, LAYERNORM_GELU),
    "neox-untied-biases": (NEOX, {**LAYERNORM_GELU, **BIASES, "tie_word_embeddings": False, "rope_theta": 5e4}),
    "neox-mlp-bias": (NEOX, {**LAYERNORM_GELU, "mlp_bias": True}),
    "system-4": (SMOLTRAIN, SYSTEM_4),
    "own-gpt2-without-biases": (SMOLTRAIN, {**LAYERNORM_GELU, "positions": "learned"}),
    "own-gpt2-untied": (SMOLTRAIN, {**AS_GPT2, "tie_word_embeddings": False}),
    "own-neox-gqa": (SMOLTRAIN, {**LAYERNORM_GELU, **GQA}),
    "own-swiglu-layernorm": (SMOLTRAIN, {"norm": "layernorm", **BIASES, **GQA, "rope_theta": 2000.0}),
}


def section(changes: dict[str, Any]) -> ModelSection:
    return ModelSection.model_validate({**SHAPE, **changes})


def ids(rows: int = 2, tokens: int = 20) -> Tensor:
    return torch.randint(1, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


def loaded(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True, **options
    )
    return model[0].eval(), model[1]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with folders.one_thread():
        yield


@pytest.fixture(autouse=True)
def modules_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers copies a folder's code to a cache in the home folder and imports it from there."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


# --- both ways


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_there_and_back(tmp_path: Path, case: str):
    name, changes = CASES[case]
    ours = folders.hub(tmp_path / "hub", section(changes))
    assert hf_class_name(section(changes)) == name
    theirs, report = loaded(tmp_path / "hub")
    assert type(theirs).__name__ == name
    assert not any(report.values()), report
    logits = ours(ids())
    assert logits.std() > 0.5
    torch.testing.assert_close(theirs(ids()).logits, logits, rtol=0, atol=1e-5)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == section(changes).tie_word_embeddings
    back, tensors = read_hf_decoder(tmp_path / "hub")
    assert back == section(changes)
    assert tensors.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(tensors[n], p) for n, p in ours.named_parameters())


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox", "system-4"])
@torch.no_grad()
def test_what_transformers_writes_is_read(tmp_path: Path, case: str):
    _, changes = CASES[case]
    ours = folders.hub(tmp_path / "hub", section(changes))
    theirs, _ = loaded(tmp_path / "hub")
    theirs.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / WEIGHT_INDEX).is_file()
    back, tensors = read_hf_decoder(tmp_path / "again")
    assert back == section(changes)
    assert all(torch.equal(tensors[n], p) for n, p in ours.named_parameters())


def test_a_folder_of_another_time(tmp_path: Path):
    """Without prefixes, with buffers, with the head's new name, with the words of transformers 4."""
    shape = section(CASES["gpt2"][1])
    folders.hub(tmp_path, shape)
    want = read_hf_decoder(tmp_path)[1]
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    old |= {"h.0.attn.bias": torch.ones(1), "h.1.attn.masked_bias": torch.ones(1)}
    save_file(old, tmp_path / "model.safetensors")
    about = json.loads((tmp_path / "config.json").read_text())
    about["n_inner"] = None  # four times the width
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"mlp.c_fc.bias has another shape: saw \(48,\), want \(128,\)"):
        read_hf_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(about | {"n_inner": 48}))
    assert all(torch.equal(x, want[name]) for name, x in read_hf_decoder(tmp_path)[1].items())

    shape = section(CASES["neox-untied-biases"][1])
    folders.hub(tmp_path, shape)
    tensors = load_file(tmp_path / "model.safetensors")
    # What we write is the older name, which transformers 4 reads alone: without it the head would be random there.
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    about = json.loads((tmp_path / "config.json").read_text())
    del about["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert read_hf_decoder(tmp_path)[0] == shape


@pytest.mark.parametrize("case", ["gpt2", "neox"])
@torch.no_grad()
def test_a_model_that_transformers_made(tmp_path: Path, case: str):
    """Fresh ones of their own classes: the direction in which no table of ours was written first."""
    if case == "gpt2":
        theirs: Any = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=24))
    else:
        shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"intermediate_size": 48, "rotary_pct": 1.0, "hidden_act": "gelu_new", "use_parallel_residual": False}
        theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, max_position_embeddings=24))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    theirs.eval().save_pretrained(tmp_path)
    section, tensors = read_hf_decoder(tmp_path)
    ours = folders.lively(section)
    ours.load_state_dict(tensors)
    x = ids(tokens=24) % 61
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-5)


# --- what is refused


def test_tensors_that_are_not_what_they_seem(tmp_path: Path):
    folders.hub(tmp_path, section(GQA))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert "lm_head.weight" not in read_hf_decoder(tmp_path)[1], "the tied table twice is no harm"
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match="the tied head is not the embedding table"):
        read_hf_decoder(tmp_path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}, file)
    with pytest.raises(UserError, match=r"model.norm.weight has another dtype: saw torch.int8"):
        read_hf_decoder(tmp_path)
