"""Tiny decoders in the shapes of Llama, GPT-NeoX and GPT-2, a batch for them, and what they make of it."""

from typing import Any

import torch
from torch import Tensor

from smoltrain.config.schema import ModelSection
from smoltrain.model.decoder import Decoder
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


def loss_and_gradients(model: Decoder) -> tuple[Tensor, Tensors]:
    ids, labels = batch()
    with torch.random.fork_rng():
        torch.manual_seed(3)  # the dropout masks
        loss = model(ids, labels)
        loss.backward()
    return loss.detach(), gradients(model)
