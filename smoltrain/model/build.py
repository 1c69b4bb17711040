"""Build a model of any kind: our decoder, one of transformers, a program's own; and what kernels must know of it."""

import torch
from torch import nn

from smoltrain.config.schema import AnyModelSection, ModelSection, OwnModelSection
from smoltrain.model.decoder import build_decoder
from smoltrain.model.interface import ComputeOptions, LanguageModel
from smoltrain.model.own_model import build_own_model
from smoltrain.model.transformers_model import build_transformers_model, transformers_attention_dropout

DEFAULT_OPTIONS = ComputeOptions()


def build_model(
    section: AnyModelSection,
    computing: ComputeOptions = DEFAULT_OPTIONS,
    *,
    device: torch.device | str = "cpu",
    document_mask: bool = False,
) -> LanguageModel:
    """A model with fresh fp32 weights; the same ones for the same torch.manual_seed.

    Of `computing` a model of transformers takes attention, z_loss, and gradient checkpointing of no block or of every
    block, a program's own takes z_loss. On the device 'meta' no weight is allocated (but by a program), which is enough
    to count them, and to check the section. With `document_mask` it is also checked that the model keeps packed
    documents apart; on 'meta' only that it takes their positions.
    Errors: UserError for a section that transformers refuses, a program's own model that no program provides, a kernel
    that this model does not have, or no such mask.
    """
    if isinstance(section, ModelSection):
        return build_decoder(section, computing, device)
    if isinstance(section, OwnModelSection):
        return build_own_model(section, device, document_mask, computing.z_loss)
    return build_transformers_model(section, computing, device, document_mask)


def model_attention_dropout(section: AnyModelSection) -> float:
    """Probability of dropout on the attention weights, which not every kernel has. Errors: as `build_model`."""
    if isinstance(section, ModelSection):
        return section.attention_dropout
    if isinstance(section, OwnModelSection):
        return 0.0
    return transformers_attention_dropout(section)


def decoder_head_width(section: AnyModelSection) -> int | None:
    """Width of an attention head of our own decoder; None for any other model."""
    if isinstance(section, ModelSection):
        return section.hidden_size // section.num_attention_heads
    return None


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, a shared one counted once."""
    return sum(p.numel() for p in module.parameters())
