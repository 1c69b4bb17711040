"""What a run leaves to the machine, settled in one place, each with its reason: precision, kernels, compiling."""

from dataclasses import dataclass, replace

import psutil
import torch

from smoltrain.config.schema import Config
from smoltrain.distributed.world import World
from smoltrain.estimate.fitting import fit_config_to_memory
from smoltrain.kernels.precision import choose_precision
from smoltrain.model.build import build_model, count_parameters
from smoltrain.model.choose_kernels import choose_kernels
from smoltrain.model.interface import ComputeOptions

FIT_REASONS = {  # `smoltrain estimate` shows by how much
    "micro-batch": "auto: what keeps a device busy and is estimated to fit",
    "gradient checkpointing": "auto: the least that is estimated to fit",
}


@dataclass(frozen=True)
class ResolvedSettings:
    """How this run computes; `reasons` are (what, which and why) for the console."""

    config: Config  # with a value for what was `auto` in batch and gradient checkpointing
    precision: str
    computing: ComputeOptions
    num_parameters: int
    reasons: dict[str, str]


def resolve_auto_settings(config: Config, world: World, rows_per_step: int) -> ResolvedSettings:
    """The same on every rank, and at every start of the same plan. Collective.

    Errors: UserError for what cannot run here.
    """
    precision, why = choose_precision(config.engine.precision, world.device)
    num_parameters = count_parameters(build_model(config.model, device="meta"))
    computing, reasons = choose_kernels(
        config, world.device, precision, num_parameters=num_parameters, rows_per_step=rows_per_step
    )
    asked = {"micro-batch": config.batch.micro_batch, "gradient checkpointing": config.engine.gradient_checkpointing}
    if "auto" in asked.values():
        config = world.run_on_first_rank(lambda: _fit_to_memory(config, world, rows_per_step, precision, computing))
    recompute, rows = config.engine.gradient_checkpointing, config.batch.micro_batch_rows
    assert recompute != "auto", "it has been settled"
    for what, value in (("micro-batch", f"{rows} row{'s' * (rows > 1)}"), ("gradient checkpointing", recompute)):
        reasons[what] = f"{value}, {FIT_REASONS[what] if asked[what] == 'auto' else 'as the recipe asks'}"
    computing = replace(computing, gradient_checkpointing=recompute)
    return ResolvedSettings(
        config, precision, computing, num_parameters, {"precision": f"{precision}, {why}", **reasons}
    )


def _fit_to_memory(
    config: Config, world: World, rows_per_step: int, precision: str, computing: ComputeOptions
) -> Config:
    """What is left to the estimator is settled by the memory of the ranks' device."""
    kind = "cuda" if world.device.type == "cuda" else "cpu"
    memory = psutil.virtual_memory().total / world.local_size
    if kind == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    return fit_config_to_memory(
        config, memory, world.size, device=kind, rows_per_step=rows_per_step, precision=precision, computing=computing
    )
