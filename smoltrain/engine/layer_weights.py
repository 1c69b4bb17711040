"""Per-layer norms of the fp32 master weights, and how far an update moved them, under any ZeRO stage.

A layer whose update is about a thousandth of its weights learns as the others do; one that is far from it has a
learning rate or a scale of its own. Each rank adds up what it holds, and one collective adds up the ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smoltrain.distributed.world import World
from smoltrain.engine.layer_gradients import layer_name, wide_slices
from smoltrain.engine.master_weights import MasterWeights


@dataclass(frozen=True)
class LayerWeight:
    """One layer's fp32 master weights: their L2 norm before an update, and that of what it changed, over it."""

    norm: float
    update_ratio: float


class UpdateMeter:
    """Holds a copy of the master weights as they are when it is made: four bytes for each weight that a rank holds."""

    def __init__(self, masters: MasterWeights, world: World) -> None:
        self._masters = masters
        self._world = world
        self._before = [part.clone() for _, part in masters.parts()]

    def measure(self) -> dict[str, LayerWeight]:
        """Layer name -> its weights, after the update; the copy is gone then. Collective."""
        layers = list(dict.fromkeys(layer_name(name) for name in self._masters.parameter_names))
        index = {layer: i for i, layer in enumerate(layers)}
        device = torch.device("cpu" if self._world.device.type == "mps" else self._world.device)  # fp64 is needed
        squares = torch.zeros(len(layers), 2, dtype=torch.float64, device=device)
        for name, weight_square, update_square in self._sum_squares():
            squares[index[layer_name(name)]] += torch.stack((weight_square, update_square)).to(device)
        self._before = []
        norms = self._world.gather_numbers(squares.flatten()).sum(0).sqrt().view(-1, 2).tolist()
        return {layer: _compare(*norms[i]) for layer, i in index.items()}

    def _sum_squares(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(parameter's name, sum of squares before the update, that of the difference) of each slice, in fp64."""
        for (name, after), before in zip(self._masters.parts(), self._before, strict=True):
            for old, new in zip(wide_slices(before), wide_slices(after), strict=True):
                yield name, old.square().sum(), (new - old).square().sum()


def _compare(norm: float, change: float) -> LayerWeight:
    """A layer of zeros has moved infinitely far, if it has moved."""
    if norm == 0:
        return LayerWeight(norm, float("inf") if change else 0.0)
    return LayerWeight(norm, change / norm)
