"""What a run leaves to the machine, settled in one place, each with its reason: precision, kernels, compiling."""

from dataclasses import dataclass, replace

import psutil
import torch

from smoltrain import ds_config, estimate, kernels, model
from smoltrain.dist import World
from smoltrain.schema import Config


@dataclass(frozen=True)
class Choices:
    """How this run computes; `reasons` are (what, which and why) for the console."""

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
    recompute, reason = config.engine.gradient_checkpointing, "as the recipe asks"
    if recompute == "auto":
        recompute, reason = world.on_first(lambda: _least(config, world, rows_per_step, precision, computing))
    return Choices(
        precision,
        replace(computing, gradient_checkpointing=recompute),
        num_parameters,
        {"precision": f"{precision}, {why}", **reasons, "gradient checkpointing": f"{recompute}, {reason}"},
    )


def _least(
    config: Config, world: World, rows_per_step: int, precision: str, computing: model.Computing
) -> tuple[estimate.Recompute, str]:
    """The least gradient checkpointing that fits a rank's memory by the estimate, and the reason."""
    kind = "cuda" if world.device.type == "cuda" else "cpu"
    memory = psutil.virtual_memory().total / world.local_size
    if kind == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    found = estimate.least_recomputation(
        config, memory, world.size, device=kind, rows_per_step=rows_per_step, precision=precision, computing=computing
    )
    return found, f"auto: the least that is estimated to fit {memory / 2**30:.0f} GiB a rank"
