"""Per-layer gradient norms and histograms of the whole, averaged gradient, under any ZeRO stage.

They are computed where the gradients are, and read once at the end: copying a model's gradients to the host, and going
through them there, takes seconds. The gradients are run through twice, as the bins follow from the smallest and the
largest entry of a layer. Of a parameter a slice at a time is widened to fp64.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS = 64
SLICE = 2**22  # entries that are in work at a time: 32 MiB of fp64, and ten times that for what is made of them
CPU_SLICE = 2**16  # which stay in its caches
LANES = 1024  # counters of each bin, so that the threads of a GPU do not all wait for the same one

# What gives (parameter name, whole gradient) pairs, the same ones each time it is called: `Engine.gradients`.
Gradients = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass
class LayerGradient:
    """One layer's gradient before clipping: its L2 norm and a histogram of its entries."""

    norm: float
    counts: np.ndarray  # [BINS] entries per bin
    edges: np.ndarray  # [BINS + 1] bin borders


def summarize_layer_gradients(gradients: Gradients) -> dict[str, LayerGradient]:
    """Layer name -> its gradient. Collective where `gradients` is: it is called twice, and run through to the end."""
    ranges: dict[str, _LayerRange] = {}
    for name, gradient in gradients():
        layer = layer_name(name)
        for entries in wide_slices(gradient):
            ranges[layer] = _widen_range(ranges.get(layer), entries)
    edges = {layer: _make_edges(found) for layer, found in ranges.items()}
    counts = {layer: edges[layer].new_zeros(LANES * (BINS + 1), dtype=torch.int64) for layer in edges}
    for name, gradient in gradients():
        layer = layer_name(name)
        for entries in wide_slices(gradient):
            _count_entries(counts[layer], edges[layer], entries)
    numbers = [
        torch.cat((ranges[layer].squared_norm.sqrt().view(1), edges[layer], _sum_lanes(counts[layer])))
        for layer in ranges
    ]
    rows = _read(torch.stack(numbers)) if numbers else []
    summaries = [LayerGradient(float(row[0]), row[2 + BINS :].astype(np.int64), row[1 : 2 + BINS]) for row in rows]
    return dict(zip(ranges, summaries, strict=True))


def layer_name(parameter: str) -> str:
    """'layers.03' for a parameter of the fourth block (zero-padded, so that names sort), else the owner of the tensor.

    Blocks are numbered behind layers, layer, h, blocks or block in the decoder and in the models of transformers.
    """
    block = re.search(r"\b(?:layers?|h|blocks?)\.(\d+)\.", parameter)
    return f"layers.{int(block[1]):02d}" if block else parameter.split(".")[-2:][0]


@dataclass
class _LayerRange:
    """Scalars on the device, fp64: inf and -inf where no entry is finite."""

    squared_norm: Tensor  # of all entries, finite or not
    least: Tensor  # of the finite ones
    most: Tensor


def wide_slices(gradient: Tensor) -> Iterable[Tensor]:
    """Its entries in fp64: in fp32 the bins of tiny, huge or nearly equal entries cannot be placed."""
    flat = gradient.flatten()
    if flat.device.type == "mps":  # which has no fp64
        flat = flat.cpu()
    size = CPU_SLICE if flat.device.type == "cpu" else SLICE
    return (entries.double() for entries in flat.split(size) if len(entries))


def _widen_range(before: _LayerRange | None, entries: Tensor) -> _LayerRange:
    is_finite = entries.isfinite()
    squared_norm = entries.square().sum()
    least = entries.where(is_finite, torch.inf).amin()
    most = entries.where(is_finite, -torch.inf).amax()
    if before is None:
        return _LayerRange(squared_norm, least, most)
    return _LayerRange(
        before.squared_norm + squared_norm, torch.minimum(before.least, least), torch.maximum(before.most, most)
    )


def _make_edges(found: _LayerRange) -> Tensor:
    """Borders of BINS bins, as numpy.histogram and numpy.linspace make them, to the bit."""
    nothing = found.least > found.most
    first = found.least.where(~nothing, 0.0)
    last = found.most.where(~nothing, 1.0)
    is_flat = first == last
    first = torch.where(is_flat, first - 0.5, first)
    last = torch.where(is_flat, last + 0.5, last)
    places = torch.arange(BINS + 1, dtype=torch.float64, device=first.device)
    width = (last - first) / BINS
    # A width that is rounded to 0 is multiplied last.
    edges = torch.where(width == 0, places / BINS * (last - first), places * width) + first
    return torch.where(places == BINS, last, edges)


def _count_entries(counts: Tensor, edges: Tensor, entries: Tensor) -> None:
    """Add the entries to their bins as numpy.histogram does; those that are not finite to one behind the last."""
    is_finite = entries.isfinite()
    finite = entries.where(is_finite, edges[0])
    bins = ((finite - edges[0]) / (edges[BINS] - edges[0]) * BINS).long().clamp_(max=BINS - 1)
    # Rounding may have put an entry beside its bin.
    bins -= (finite < edges[bins]).long()
    bins += ((finite >= edges[bins + 1]) & (bins != BINS - 1)).long()
    bins = bins.where(is_finite, BINS)
    lanes = torch.arange(len(bins), device=bins.device).remainder_(LANES)
    counts.scatter_add_(0, lanes * (BINS + 1) + bins, counts.new_ones(()).expand(len(bins)))


def _sum_lanes(counts: Tensor) -> Tensor:
    """Entries in each bin; as fp64, which is exact up to 2^53, beside the other numbers."""
    return counts.view(LANES, BINS + 1).sum(0)[:BINS].double()


def _read(numbers: Tensor) -> np.ndarray:
    """Wait for the device: the only time."""
    return numbers.cpu().numpy()
