"""Models whose way of computing is said in keywords."""

from typing import Any

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
