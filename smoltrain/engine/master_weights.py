"""Where the fp32 master weights lie in what DeepSpeed has made of the optimizer's parameters, under any ZeRO stage.

Under ZeRO-1, 2 and 3 a rank has flat tensors, whose layout is that of resharding (reshard.py); under ZeRO-0 every rank
has all parameters, whole.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from smoltrain.distributed.world import World
from smoltrain.engine.reshard import GAPS_KEY, ParameterSlice, ShardLayout, build_shard_layout

MASTERS_ATTRIBUTES = (  # of DeepSpeedZeroOptimizer, BF16_Optimizer and DeepSpeedZeroOptimizer_Stage3
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_partitioned_groups_flat",
)


def find_flat_masters(zero_optimizer: Any) -> list[Tensor]:
    """This rank's flat fp32 tensors, under ZeRO-1, 2 and 3."""
    for name in MASTERS_ATTRIBUTES:
        if hasattr(zero_optimizer, name):
            return list(getattr(zero_optimizer, name))
    raise AssertionError(f"no masters in {type(zero_optimizer).__name__}")


def find_master_layout(deepspeed_engine: Any, world: World) -> ShardLayout:
    """How the ranks hold the flat tensors, as far as resharding knows; `fits_layout` tells whether it is so."""
    stage = int(deepspeed_engine.zero_optimization_stage())
    gaps = deepspeed_engine.optimizer.state_dict().get(GAPS_KEY)
    return build_shard_layout(stage, deepspeed_engine._get_zero_param_shapes(), gaps, world.size)


def fits_layout(master: Tensor, layout: ShardLayout, tensor: int, parameters: dict[str, Tensor], rank: int) -> bool:
    """Whether a flat tensor holds what `layout` says, by its numbers: as long as nothing is trained, the weights'."""
    fits = master.dtype == torch.float32 and master.numel() == layout.shard_size(tensor)
    for piece in layout.parameter_slices(rank):
        if fits and piece.tensor == tensor:
            weights = _local_weights(parameters[piece.name], piece)
            fits = torch.equal(_slice_of(master, piece).to(weights), weights)
    return fits


def _slice_of(master: Tensor, piece: ParameterSlice) -> Tensor:
    """The elements of a piece in the flat tensor that holds them."""
    return master[piece.offset : piece.offset + piece.stop - piece.first]


def _local_weights(parameter: Tensor, piece: ParameterSlice) -> Tensor:
    """The same elements of the weights that are computed with; of ZeRO-3's this rank has no others."""
    own = getattr(parameter, "ds_tensor", None)
    if own is not None:
        return own.detach().view(-1)[: piece.stop - piece.first]
    return parameter.detach().view(-1)[piece.first : piece.stop]


class MasterWeights:
    """The master weights by parameter: over all ranks every weight that is trained is there once."""

    def __init__(self, deepspeed_engine: Any, world: World) -> None:
        """After deepspeed.initialize, before the first update."""
        self._optimizer = deepspeed_engine.optimizer
        self._world = world
        self._parameters: dict[str, Tensor] = dict(deepspeed_engine.module.named_parameters())
        self._layout: ShardLayout | None = None
        if int(deepspeed_engine.zero_optimization_stage()) > 0:
            self._layout = find_master_layout(deepspeed_engine, world)

    @property
    def parameter_names(self) -> list[str]:
        """Of all parameters that are trained, the same on every rank."""
        return [name for name, parameter in self._parameters.items() if parameter.requires_grad]

    def are_found(self) -> bool:
        """Whether `parts` are what they say, on every rank. Collective; to be asked before the first update."""
        fits = True
        if self._layout is not None:
            for tensor, master in enumerate(find_flat_masters(self._optimizer)):
                fits = fits and fits_layout(master, self._layout, tensor, self._parameters, self._world.rank)
        return all(self._world.gather(fits))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, some of its elements), the same ones each time; the tensors are those in use."""
        if self._layout is None:
            if self._world.is_first:  # the others have the same
                yield from self._whole_masters()
            return
        masters = find_flat_masters(self._optimizer)
        for piece in self._layout.parameter_slices(self._world.rank):
            yield piece.name, _slice_of(masters[piece.tensor], piece).detach()

    def _whole_masters(self) -> Iterator[tuple[str, Tensor]]:
        """ZeRO-0's: in fp16 copies beside the weights (FP16_UnfusedOptimizer), else the weights."""
        names = {parameter: name for name, parameter in self._parameters.items()}
        weights = getattr(self._optimizer, "fp16_groups", None)
        masters = getattr(self._optimizer, "fp32_groups", None)
        if weights is None or masters is None:
            masters = weights = [group["params"] for group in self._optimizer.param_groups]
        for group, master_group in zip(weights, masters, strict=True):
            for weight, master in zip(group, master_group, strict=True):
                yield names[weight], master.detach()
