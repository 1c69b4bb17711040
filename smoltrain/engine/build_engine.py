"""Hand a model to DeepSpeed, and choose who reduces its gradients and updates it."""

import contextlib
from collections.abc import Iterator

import torch

from smoltrain.config.schema import Config
from smoltrain.distributed.world import World
from smoltrain.engine.bind_matrices import bind_matrices
from smoltrain.engine.deepspeed_json import fill_deepspeed_config, offloads_optimizer
from smoltrain.engine.deepspeed_private import (
    ZERO_SUPPORTED_OPTIMIZERS,
    DeepSpeedZeroOptimizer,
    deepspeed,
    meter_collectives,
    refuse_what_deepspeed_refuses,
)
from smoltrain.engine.deepspeed_steps import choose_deepspeed_steps
from smoltrain.engine.engine import Engine, EngineFacts, silence_stdout
from smoltrain.engine.hidden_matrices import count_elements, split_parameters
from smoltrain.engine.master_weights import MasterWeights
from smoltrain.engine.muon import MuonOptimizer
from smoltrain.engine.once_per_step import OncePerStep
from smoltrain.engine.optimizer import OPTIMIZERS, build_optimizer, checkpoint_bytes
from smoltrain.engine.optimizer_kind import OptimizerKind
from smoltrain.engine.reduction import ReductionChoice, check_reduction, choose_reduction, gradient_dtypes
from smoltrain.engine.step_method import StepMethod
from smoltrain.errors import Problem, UserError
from smoltrain.kernels.joint_linear import find_layers_apart
from smoltrain.kernels.precision import DTYPES


def build_engine(
    model: torch.nn.Module, config: Config, world: World, *, precision: str, accumulation: int, compiles: bool = False,
    reduction: ReductionChoice | None = None,
) -> Engine:  # fmt: skip
    """Hand the model to DeepSpeed with the recipe's optimizer and numbers. Collective.

    `compiles`: whether torch.compile may be used. `reduction`: what the memory of the ranks' devices decides, the same
    on every rank; None: choose_reduction without an estimate of it. Errors: UserError where the DeepSpeed config
    contradicts the recipe, and where engine.reduce_gradients=step is impossible.
    """
    tree = fill_deepspeed_config(config, precision=precision, accumulation=accumulation, world_size=world.size)
    requested = config.engine.reduce_gradients
    check_reduction(tree, requested)
    choice = reduction or choose_reduction(tree, device=world.device.type, requested=requested)
    if config.engine.cuda_graphs and not choice.once_per_step:
        # DeepSpeed holds on to gradients between micro-batches, and a replay would overwrite them.
        want = "gradients that are reduced once per step; or false"
        change = "engine.cuda_graphs or engine.reduce_gradients"
        raise UserError(Problem("CUDA graphs cannot be replayed", f"DeepSpeed reduces: {choice.reason}", want, change))

    model.to(world.device)
    kind = OPTIMIZERS[config.optimizer.kind]
    facts = _find_facts(model, kind, precision)
    optimizer = build_optimizer(model, config.optimizer, world.device)
    if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
        tree["zero_allow_untested_optimizer"] = True
    if offloads_optimizer(tree):
        tree.setdefault("zero_force_ds_cpu_optimizer", False)  # else DeepSpeed refuses any optimizer but its own
    with refuse_what_deepspeed_refuses(config.engine.ds_config), silence_stdout(), _default_to_eager_backend():
        deepspeed_engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=tree, dist_init_required=False
        )
    meter_collectives(world)
    apart = find_layers_apart(model)
    if apart is not None:
        saw = f"under engine.ds_config={config.engine.ds_config} the weights of {apart} do not lie side by side"
        change = "engine.fused_projections or engine.ds_config"
        raise UserError(Problem("projections cannot be fused", saw, "ZeRO-1 or 2; or false", change))
    if isinstance(optimizer, MuonOptimizer):
        bind_matrices(optimizer, deepspeed_engine, world)

    masters = MasterWeights(deepspeed_engine, world) if config.track.gradients_every else None
    if masters and not masters.are_found():
        masters = None
    steps: StepMethod
    if choice.once_per_step:
        assert isinstance(deepspeed_engine.optimizer, DeepSpeedZeroOptimizer)
        clip = config.optimizer.gradient_clipping
        steps = OncePerStep(
            deepspeed_engine, kind, world, choice.reason, accumulation=accumulation, clip=clip, compiles=compiles
        )
    else:
        steps = choose_deepspeed_steps(deepspeed_engine, choice.reason)
    return Engine(deepspeed_engine, steps, facts, gradient_dtypes(tree), world, masters)


def _find_facts(model: torch.nn.Module, kind: OptimizerKind, precision: str) -> EngineFacts:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_hidden = count_elements(split_parameters(model).hidden)
    size = checkpoint_bytes(kind, num_hidden, num_parameters - num_hidden, DTYPES[precision].itemsize)
    return EngineFacts(kind.describe(model), size)


@contextlib.contextmanager
def _default_to_eager_backend() -> Iterator[None]:
    """DeepSpeed imports its Muon, which hands functions to torch.compile: with inductor that is a second of imports."""
    set_default = getattr(torch.compiler, "set_default_backend", lambda _: None)  # since torch 2.13
    set_default("eager")
    try:
        yield
    finally:
        set_default(None)
