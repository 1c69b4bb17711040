"""Tells Muon where its matrices lie in what DeepSpeed has made of the optimizer's parameters."""

import functools
from typing import Any

import torch

from smoltrain.distributed.world import World
from smoltrain.engine.matrix_exchange import MatrixExchange, plan_matrices
from smoltrain.engine.muon import MuonOptimizer, plan_whole_matrices
from smoltrain.engine.reshard import GAPS_KEY, ParameterSlice, ShardLayout, build_shard_layout
from smoltrain.errors import Problem, UserError
from smoltrain.kernels.newton_schulz import newton_schulz_flops


def bind_matrices(optimizer: MuonOptimizer, deepspeed_engine: Any, world: World) -> None:
    """Bind each hidden group to an exchange of its matrices. After deepspeed.initialize, before the first update.

    Errors: UserError where DeepSpeed holds the masters in another way than resharding knows.
    """
    stage = int(deepspeed_engine.zero_optimization_stage())
    if stage == 0:
        _bind_whole_matrices(optimizer, world)
        return
    zero_optimizer = deepspeed_engine.optimizer
    shapes = deepspeed_engine._get_zero_param_shapes()
    layout = build_shard_layout(stage, shapes, zero_optimizer.state_dict().get(GAPS_KEY), world.size)
    hidden = next(group for group in optimizer.param_groups if group["hidden"])
    steps = hidden["newton_schulz_steps"]
    parameters = dict(deepspeed_engine.module.named_parameters())
    for tensor, master in enumerate(_find_masters(zero_optimizer)):
        _check_master(master, layout, tensor, parameters, world.rank)
        if not group_of_tensor(zero_optimizer, optimizer, tensor)["hidden"]:
            continue
        part = ShardLayout((layout.tensors[tensor],), layout.alignment, world.size)
        slices = [list(part.parameter_slices(rank)) for rank in range(world.size)]
        sides = {name: (shape[0], shape[1]) for name, shape in shapes[tensor].items()}
        plan = plan_matrices(sides, slices, functools.partial(newton_schulz_flops, steps=steps))
        optimizer.bind(master, MatrixExchange(plan, world))


def _bind_whole_matrices(optimizer: MuonOptimizer, world: World) -> None:
    """ZeRO-0: every rank has all matrices; each works on its share of them, and sends it to the others."""
    for group in optimizer.param_groups:
        if group["hidden"]:
            matrices = group["params"]
            plan = plan_whole_matrices(matrices, world.size, group["newton_schulz_steps"])
            optimizer.bind(matrices[0], MatrixExchange(plan, world))


def _find_masters(zero_optimizer: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors of DeepSpeedZeroOptimizer, BF16_Optimizer or DeepSpeedZeroOptimizer_Stage3."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(zero_optimizer, name):
            return list(getattr(zero_optimizer, name))
    raise AssertionError(f"no masters in {type(zero_optimizer).__name__}")


def group_of_tensor(zero_optimizer: Any, optimizer: torch.optim.Optimizer, tensor: int) -> dict[str, Any]:
    """The parameter group of a flat tensor; ZeRO-3 may make several of one group."""
    groups = getattr(zero_optimizer, "sub_group_to_group_id", None)
    return optimizer.param_groups[tensor if groups is None else groups[tensor]]


def _check_master(
    master: torch.Tensor, layout: ShardLayout, tensor: int, parameters: dict[str, torch.Tensor], rank: int
) -> None:
    """That a flat tensor holds what `layout` says, by its numbers: they are the weights' as long as nothing is trained.

    Errors: UserError.
    """
    fits = master.dtype == torch.float32 and master.numel() == layout.shard_size(tensor)
    for piece in layout.parameter_slices(rank):
        if fits and piece.tensor == tensor:
            here = master[piece.offset : piece.offset + piece.stop - piece.first]
            weights = _local_weights(parameters[piece.name], piece)
            fits = torch.equal(here.to(weights.dtype), weights)
    if not fits:
        saw = "flat tensors that are cut otherwise, or not in fp32"
        want = "flat fp32 tensors split evenly over all ranks; or optimizer.kind=adamw"
        what = "muon does not know where its matrices lie"
        raise UserError(Problem(what, saw, want, "engine.ds_config or optimizer.kind"))


def _local_weights(parameter: torch.Tensor, piece: ParameterSlice) -> torch.Tensor:
    """The same elements of the weights that are computed with; of ZeRO-3's this rank has no others."""
    own = getattr(parameter, "ds_tensor", None)
    if own is not None:
        return own.detach().view(-1)[: piece.stop - piece.first]
    return parameter.detach().view(-1)[piece.first : piece.stop]
