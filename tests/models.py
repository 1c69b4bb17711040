"""Models whose way of computing is said in keywords."""

from typing import Any

from smoltrain.model import Computing, LanguageModel, build
from smoltrain.schema import ModelSection, TransformersSection


def build_with(
    section: ModelSection | TransformersSection, *, device: str = "cpu", document_mask: bool = False, **computing: Any
) -> LanguageModel:
    """`build` with the fields of Computing as keywords."""
    return build(section, Computing(**computing), device=device, document_mask=document_mask)
