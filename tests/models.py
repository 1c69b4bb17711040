"""Models whose way of computing is said in keywords."""

from typing import Any

import torch

from smoltrain.config.schema import AnyModelSection, Config
from smoltrain.model.build import build_model
from smoltrain.model.interface import ComputeOptions, LanguageModel


def build_with(
    section: AnyModelSection, *, device: str = "cpu", document_mask: bool = False, **computing: Any
) -> LanguageModel:
    """`build` with the fields of Computing as keywords."""
    return build_model(section, ComputeOptions(**computing), device=device, document_mask=document_mask)


def from_config(settings: Config) -> LanguageModel:
    """The model of a run, with the gradient checkpointing that its recipe asks for."""
    mode = settings.engine.gradient_checkpointing
    assert mode != "auto"
    return build_model(settings.model, ComputeOptions(mode))


def assert_cache_changes_nothing(model: LanguageModel, ids_BT: torch.Tensor, pieces: list[int]) -> None:
    """Two texts of 20 tokens have the same logits piece by piece as at once, and the last token alone has its own."""
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache) for piece in ids_BT.split(pieces, dim=1)], 1)
        torch.testing.assert_close(logits, model(ids_BT), rtol=0, atol=1e-5)
        last = model(ids_BT[:, :9], cache=(again := model.new_cache(2, 20)), last_only=True)
        torch.testing.assert_close(last, logits[:, 8:9], rtol=0, atol=1e-5)
    assert (cache.length, again.length) == (20, 9)
