"""What a run leaves to the machine, settled in one place, each with its reason: precision, kernels, compiling."""

from dataclasses import dataclass, replace

import psutil
import torch

from smoltrain import ds_config, estimate, kernels, model
from smoltrain.dist import World
from smoltrain.schema import Config

FITS = {  # `smoltrain estimate` shows by how much
    "micro-batch": "auto: what keeps a device busy and is estimated to fit",
    "gradient checkpointing": "auto: the least that is estimated to fit",
}


@dataclass(frozen=True)
class Choices:
    """How this run computes; `reasons` are (what, which and why) for the console."""

    config: Config  # with a value for what was `auto` in batch and gradient checkpointing
    precision: str
    computing: model.Computing
    num_parameters: int
    reasons: dict[str, str]


def choose(config: Config, world: World, rows_per_step: int) -> Choices:
    """The same on every rank, and at every start of the same plan. Collective.

    Errors: UserError for what cannot run here.
    """
    precision, why = ds_config.choose_precision(config.engine.precision, world.device)
    num_parameters = model.parameter_count(model.build(config.model, device="meta"))
    computing, reasons = kernels.settle(
        config, world.device, precision, num_parameters=num_parameters, rows_per_step=rows_per_step
    )
    asked = {"micro-batch": config.batch.micro_batch, "gradient checkpointing": config.engine.gradient_checkpointing}
    if "auto" in asked.values():
        config = world.on_first(lambda: _fitted(config, world, rows_per_step, precision, computing))
    recompute, rows = config.engine.gradient_checkpointing, config.batch.rows_at_once
    assert recompute != "auto", "it has been settled"
    for what, value in (("micro-batch", f"{rows} row{'s' * (rows > 1)}"), ("gradient checkpointing", recompute)):
        reasons[what] = f"{value}, {FITS[what] if asked[what] == 'auto' else 'as the recipe asks'}"
    computing = replace(computing, gradient_checkpointing=recompute)
    return Choices(config, precision, computing, num_parameters, {"precision": f"{precision}, {why}", **reasons})


def _fitted(config: Config, world: World, rows_per_step: int, precision: str, computing: model.Computing) -> Config:
    """What is left to the estimator is settled by the memory of the ranks' device."""
    kind = "cuda" if world.device.type == "cuda" else "cpu"
    memory = psutil.virtual_memory().total / world.local_size
    if kind == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    return estimate.settle(
        config, memory, world.size, device=kind, rows_per_step=rows_per_step, precision=precision, computing=computing
    )
