"""Resolve every `auto` in the config for this machine, and say why: precision, kernels, compiling, micro-batch.

When gradients are reduced is decided here and printed with the engine's own line.
"""

from dataclasses import dataclass, replace

import torch

from smoltrain.config.load import cut_micro_batch
from smoltrain.config.schema import Config, OwnModelSection
from smoltrain.distributed.memory_limits import find_shared_limit
from smoltrain.distributed.world import World
from smoltrain.engine.optimizer import OPTIMIZERS
from smoltrain.engine.reduction import ReductionChoice
from smoltrain.estimate.fitting import choose_reduction_by_memory, fit_config_to_memory
from smoltrain.estimate.training_setup import DeviceKind, build_training_setup
from smoltrain.kernels.precision import choose_precision
from smoltrain.model.build import build_model, count_parameters
from smoltrain.model.choose_kernels import choose_kernels
from smoltrain.model.interface import ComputeOptions, LanguageModel

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
    reduction: ReductionChoice | None = None  # of gradients; None: it does not depend on memory


def build_weightless_model(config: Config) -> LanguageModel:
    """The model on the meta device, where it takes no memory.

    Errors: UserError for a model that cannot be built, or is not for this optimizer.
    """
    model = build_model(config.model, device="meta", document_mask=config.packing.document_mask)
    OPTIMIZERS[config.optimizer.kind].parameter_groups(model, config.optimizer)
    return model


def choose_computing(
    config: Config, device: torch.device, rows_per_step: int, choice: tuple[str, str] | None = None
) -> ResolvedSettings:
    """Precision and kernels for a device; the config stays as it is.

    `choice`: the precision and its reason; None: what this machine computes in.
    Errors: UserError for what cannot run there, and for a model that is not for this optimizer.
    """
    precision, why = choice or choose_precision(config.engine.precision, device)
    num_parameters = count_parameters(build_weightless_model(config))
    computing, reasons = choose_kernels(
        config, device, precision, num_parameters=num_parameters, rows_per_step=rows_per_step
    )
    reasons = {"precision": f"{precision}, {why}", **reasons}
    return ResolvedSettings(config, precision, computing, num_parameters, reasons)


def resolve_auto_settings(config: Config, world: World, rows_per_step: int) -> ResolvedSettings:
    """The same on every rank, and at every start of the same plan. Collective.

    Errors: UserError for what cannot run here.
    """
    asked_rows = config.batch.micro_batch
    config = cut_micro_batch(config, rows_per_step, world.size)
    # Of the first rank, since hosts may have other processors.
    precision = world.run_on_first_rank(lambda: choose_precision(config.engine.precision, world.device))
    chosen = choose_computing(config, world.device, rows_per_step, precision)
    requested = {
        "micro-batch": config.batch.micro_batch,
        "gradient checkpointing": config.engine.gradient_checkpointing,
    }
    if "auto" in requested.values():
        config = world.run_on_first_rank(lambda: _fit_to_memory(chosen, world, rows_per_step))
    rows = config.batch.micro_batch_rows
    recompute = config.engine.gradient_checkpointing
    assert recompute != "auto", "it has been resolved"
    values = {"micro-batch": f"{rows} row{'s' * (rows > 1)}", "gradient checkpointing": recompute}
    why = {what: FIT_REASONS[what] if value == "auto" else "as the recipe asks" for what, value in requested.items()}
    if requested["micro-batch"] != asked_rows:
        why["micro-batch"] = f"all that a rank has of a step; batch.micro_batch={asked_rows} would be more"
    reasons = chosen.reasons | {what: f"{value}, {why[what]}" for what, value in values.items()}
    computing = replace(chosen.computing, gradient_checkpointing=recompute)
    settled = replace(chosen, config=config, computing=computing, reasons=reasons)
    asks_memory = world.device.type == "cuda" and config.engine.reduce_gradients == "auto"
    if not asks_memory or isinstance(config.model, OwnModelSection):  # of whose inside nothing is known
        return settled
    reduction = world.run_on_first_rank(lambda: choose_run_reduction(settled, "cuda", world, rows_per_step))
    return replace(settled, reduction=reduction)


def _fit_to_memory(chosen: ResolvedSettings, world: World, rows_per_step: int) -> Config:
    """The config with what the estimator finds to fit the memory of a rank's device."""
    return fit_config_to_memory(
        chosen.config, _find_memory_bytes(world), world.size, device="cuda" if world.device.type == "cuda" else "cpu",
        rows_per_step=rows_per_step, precision=chosen.precision, computing=chosen.computing,
    )  # fmt: skip


def choose_run_reduction(
    settled: ResolvedSettings, device: DeviceKind, world: World, rows_per_step: int
) -> ReductionChoice:
    """When the gradients of this run are reduced, and why, for a config without any other `auto`."""
    setup = build_training_setup(
        settled.config, world=world.size, device=device, rows_per_step=rows_per_step, precision=settled.precision,
        computing=settled.computing,
    )  # fmt: skip
    return choose_reduction_by_memory(setup, _find_memory_bytes(world))


def _find_memory_bytes(world: World) -> float:
    """Of a rank's device; ranks share that of a CPU's machine, or of their container."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return find_shared_limit().num_bytes / world.local_size
