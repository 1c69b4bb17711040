"""Per-layer gradient norms and histograms of the whole, averaged gradient, under any ZeRO stage."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

BINS = 64


@dataclass
class LayerGradient:
    """One layer's gradient before clipping: its L2 norm and a histogram of its entries."""

    norm: float
    counts: np.ndarray  # [BINS] entries per bin
    edges: np.ndarray  # [BINS + 1] bin borders


def summarize_layer_gradients(gradients: Iterable[tuple[str, torch.Tensor]]) -> dict[str, LayerGradient]:
    """Layer name -> its gradient, out of the (parameter name, whole gradient) pairs of `Engine.gradients`."""
    entries: dict[str, list[np.ndarray]] = {}
    for name, gradient in gradients:
        entries.setdefault(layer_name(name), []).append(gradient.flatten().cpu().numpy())
    return {layer: _summarize_gradient(np.concatenate(parts)) for layer, parts in entries.items()}


def layer_name(parameter: str) -> str:
    """'layers.03' for a parameter of the fourth block (zero-padded, so that names sort), else the owner of the tensor.

    Blocks are numbered behind layers, layer, h, blocks or block in the decoder and in the models of transformers.
    """
    block = re.search(r"\b(?:layers?|h|blocks?)\.(\d+)\.", parameter)
    return f"layers.{int(block[1]):02d}" if block else parameter.split(".")[-2:][0]


def _summarize_gradient(values: np.ndarray) -> LayerGradient:
    values = values.astype(np.float64)  # in fp32 numpy cannot place the bins of tiny, huge or nearly equal entries
    counts, edges = np.histogram(values[np.isfinite(values)], bins=BINS)
    return LayerGradient(float(np.linalg.norm(values)), counts, edges)
