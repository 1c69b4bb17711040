"""Tells Muon where its matrices lie in what DeepSpeed has made of the optimizer's parameters."""

import functools
from typing import Any

import torch

from smoltrain.distributed.world import World
from smoltrain.engine.master_weights import find_flat_masters, find_master_layout, fits_layout
from smoltrain.engine.matrix_exchange import MatrixExchange, plan_matrices
from smoltrain.engine.muon import MuonOptimizer, plan_whole_matrices
from smoltrain.engine.reshard import ShardLayout
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
    layout = find_master_layout(deepspeed_engine, world)
    hidden = next(group for group in optimizer.param_groups if group["hidden"])
    steps = hidden["newton_schulz_steps"]
    parameters = dict(deepspeed_engine.module.named_parameters())
    for tensor, master in enumerate(find_flat_masters(zero_optimizer)):
        if not fits_layout(master, layout, tensor, parameters, world.rank):
            saw = "flat tensors that are cut otherwise, or not in fp32"
            want = "flat fp32 tensors split evenly over all ranks; or optimizer.kind=adamw"
            what = "muon does not know where its matrices lie"
            raise UserError(Problem(what, saw, want, "engine.ds_config or optimizer.kind"))
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


def group_of_tensor(zero_optimizer: Any, optimizer: torch.optim.Optimizer, tensor: int) -> dict[str, Any]:
    """The parameter group of a flat tensor; ZeRO-3 may make several of one group."""
    groups = getattr(zero_optimizer, "sub_group_to_group_id", None)
    return optimizer.param_groups[tensor if groups is None else groups[tensor]]
