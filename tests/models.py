"""Models whose way of computing is said in keywords."""

from typing import Any

from smoltrain.model import Computing, LanguageModel, build
from smoltrain.schema import Config, ModelSection, TransformersSection


def build_with(
    section: ModelSection | TransformersSection, *, device: str = "cpu", document_mask: bool = False, **computing: Any
) -> LanguageModel:
    """`build` with the fields of Computing as keywords."""
    return build(section, Computing(**computing), device=device, document_mask=document_mask)


def from_config(settings: Config) -> LanguageModel:
    """The model of a run, with the gradient checkpointing that its recipe asks for."""
    mode = settings.engine.gradient_checkpointing
    assert mode != "auto"
    return build(settings.model, Computing(mode))
