"""Models of every kind come out of one function, with as many parameters as published."""

from typing import Any

import pytest

from smoltrain.model.build import build_model, count_parameters
from tests.model.tiny_decoders import GPT2, LLAMA, NEOX, decoder, section

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
