"""What the decoder cannot be is refused in a line; a config both ways: test_hf_format.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from smoltrain.errors import UserError
from smoltrain.model.hf_config import SUPPORTED
from smoltrain.model.hf_format import read_hf_decoder
from tests import folders
from tests.model.test_hf_format import CASES, section

Change = Callable[[dict[str, Any]], Any]
KNOWN, MISTRAL = SUPPORTED, ["MistralForCausalLM"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
REFUSED: list[tuple[str, Change, str]] = [
    ("llama", lambda c: c.update(architectures=MISTRAL), f"saw MistralForCausalLM, want one of {KNOWN}"),
    ("llama", lambda c: c.pop("architectures"), "class is not supported: saw None"),
    ("llama", lambda c: c.update(rope_parameters=LLAMA3), "scaling is not supported: saw 'llama3'"),
    ("llama", lambda c: c.update(rope_parameters=None, rope_scaling={"type": "linear"}), "supported: saw 'linear'"),
    ("llama", lambda c: c.update(hidden_act="gelu"), "hidden_act is not supported: saw 'gelu', want swish or silu"),
    ("llama", lambda c: c.update(head_dim=16), "the heads do not fit the width: saw .*head_dim 16"),
    ("llama", lambda c: c.update(num_key_value_heads=3), "the heads do not fit the width"),
    ("llama", lambda c: c.update(quantization_config={"bits": 4}), "quantized weights are not supported"),
    ("llama", lambda c: c.pop("hidden_size"), "hidden_size is missing"),
    ("llama", lambda c: c.update(vocab_size="many"), "vocab_size is not valid: saw 'many', want a whole number"),
    ("llama", lambda c: c.update(vocab_size=300), r"another vocabulary: saw \(320, 32\), want \(300, 32\)"),
    ("llama", lambda c: c.update(tie_word_embeddings=False), "a tensor is missing: saw no lm_head.weight"),
    ("llama", lambda c: c.update(mlp_bias=True), "a tensor is missing: saw no model.layers.0.mlp"),
    ("llama", lambda c: c.update(num_hidden_layers=1), "a tensor is unknown: saw model.layers.1"),
    ("gpt2", lambda c: c.update(activation_function="gelu"), "activation_function is not supported: saw 'gelu'"),
    ("gpt2", lambda c: c.update(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is not supp"),
    ("neox", lambda c: c.update(use_parallel_residual=True), "use_parallel_residual is not supported: saw True"),
    ("neox", lambda c: (c.pop("rope_parameters"), c.update(rotary_pct=0.25)), "rotary_pct is not supported: saw 0.25"),
    ("neox", lambda c: (c.pop("rope_parameters"), c.pop("rotary_pct")), "rotary_pct is not supported: saw 0.25"),
    ("neox", lambda c: c.pop("hidden_act"), "hidden_act is not supported: saw 'gelu'"),
    ("system-4", lambda c: c.update(positions="alibi"), "positions is not valid"),
]  # fmt: skip


def test_the_context_of_gpt2_has_its_word_of_before_too(tmp_path: Path):
    """llama.cpp's converter wants n_ctx in what transformers makes of config.json."""
    folders.hub(tmp_path, section(CASES["gpt2"][1]))
    about = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert about["n_ctx"] == about["n_positions"] > 0


@pytest.mark.parametrize(("case", "change", "message"), REFUSED)
def test_a_config_that_the_decoder_cannot_be(tmp_path: Path, case: str, change: Change, message: str):
    folders.hub(tmp_path, section(CASES[case][1]))
    about = json.loads((tmp_path / "config.json").read_text())
    change(about)
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=message) as error:
        read_hf_decoder(tmp_path)
    assert all(len(str(problem).splitlines()) == 1 for problem in error.value.problems)
    assert str(tmp_path) in str(error.value)
