"""What to choose so that a run fits: pure functions of a config and the bytes there are."""

from dataclasses import replace
from typing import Unpack

from smoltrain.config.schema import Config
from smoltrain.engine.reduction import MemoryForSums, ReductionChoice
from smoltrain.estimate.constants import BUSY_TOKENS, SPARE_SHARE, DeviceSpec
from smoltrain.estimate.horizon import resolve_config
from smoltrain.estimate.memory import estimate_memory
from smoltrain.estimate.training_setup import DeviceKind, Recompute, Resolved, TrainingSetup, build_training_setup

# By what they cost: no block again; every n-th; the cheap parts of all, which is little time but keeps a third; all.
RECOMPUTE_MODES: tuple[Recompute, ...] = ("none", "selective", 8, 4, 3, 2, "full")


def fit_config_to_memory(
    config: Config, device_memory_bytes: float, world: int, *, device: DeviceKind, **resolved: Unpack[Resolved]
) -> Config:
    """The config with a value for what is `auto`: batch.micro_batch and engine.gradient_checkpointing.

    Where both are, rows are split so that nothing is computed again, as far as that fits. `device_memory_bytes` is
    what one rank may use: of a CPU, the machine's memory over its ranks. Errors: as build_training_setup.
    """
    batch, engine = config.batch, config.engine
    if batch.micro_batch == "auto":
        recompute = "none" if engine.gradient_checkpointing == "auto" else None
        micro_batch = choose_micro_batch(
            config, device_memory_bytes, world, device=device, recompute=recompute, **resolved
        )
        config = config.model_copy(update={"batch": batch.model_copy(update={"micro_batch": micro_batch})})
    if engine.gradient_checkpointing == "auto":
        mode = find_least_recomputation(config, device_memory_bytes, world, device=device, **resolved)
        config = config.model_copy(update={"engine": engine.model_copy(update={"gradient_checkpointing": mode})})
    return config


def find_least_recomputation(
    config: Config, device_memory_bytes: float, world: int, *, device: DeviceKind, **resolved: Unpack[Resolved]
) -> Recompute:
    """The value of engine.gradient_checkpointing that computes least again and fits one rank; full if none fits.

    What the config itself says of gradient checkpointing is not looked at. Errors: as build_training_setup.
    """
    setup = build_training_setup(config, world=world, device=device, **resolved)
    for mode in list_recompute_modes(config, setup):
        if fits_memory(replace(setup, recompute=mode), device_memory_bytes):
            return mode
    return "full"


def choose_micro_batch(
    config: Config, device_memory_bytes: float, world: int, *, device: DeviceKind,
    recompute: Recompute | None = None, **resolved: Unpack[Resolved],
) -> int:  # fmt: skip
    """The batch.micro_batch that splits a rank's rows of a step: of those that fit, the smallest that keeps the device
    busy, else the largest; 1 if none fits.

    `recompute` takes the place of engine.gradient_checkpointing. Errors: as build_training_setup.
    """
    setup = build_training_setup(config, world=world, device=device, **resolved)
    if recompute is not None:
        setup = replace(setup, recompute=recompute)
    largest = 1
    for rows in range(1, setup.micro_batch * setup.accumulation + 1):
        split = setup.with_micro_batch(rows)
        if split is not None and fits_memory(split, device_memory_bytes):
            if split.micro_batch_tokens >= BUSY_TOKENS[device]:
                return rows
            largest = rows
    return largest


def fits_memory(setup: TrainingSetup, device_memory_bytes: float) -> bool:
    """Whether the estimate leaves SPARE_SHARE free, with gradients reduced as they would be in this memory."""
    settled = settle_reduction(setup, device_memory_bytes)
    return estimate_memory(settled).total <= device_memory_bytes * (1 - SPARE_SHARE)


def settle_reduction(setup: TrainingSetup, device_memory_bytes: float) -> TrainingSetup:
    """The setup as a run would train it in this memory: once a step where its sums of gradients fit."""
    choice = choose_reduction_by_memory(setup, device_memory_bytes)
    return replace(setup, once_per_step=choice.once_per_step)


def choose_reduction_by_memory(setup: TrainingSetup, device_memory_bytes: float) -> ReductionChoice:
    """When gradients are reduced, and why: the rule of engine/reduction.py, with what is estimated of both ways."""
    totals = [estimate_memory(replace(setup, once_per_step=once)).total for once in (True, False)]
    return setup.choose_reduction(MemoryForSums(totals[0], totals[1], device_memory_bytes * (1 - SPARE_SHARE)))


def build_fitted_setup(
    config: Config, device_memory_bytes: float, world: int, *, device: DeviceKind, **resolved: Unpack[Resolved]
) -> TrainingSetup:
    """build_training_setup of a config that is fitted to this memory, with its reduction of gradients settled."""
    return settle_reduction(build_training_setup(config, world=world, device=device, **resolved), device_memory_bytes)


def resolve_and_fit(config: Config, device: DeviceSpec, world: int) -> tuple[Config, TrainingSetup]:
    """The config with lengths in steps and a value for what is `auto`, on so many of these devices; and its setup."""
    config = resolve_config(config, config.batch.rows(world))
    config = fit_config_to_memory(config, device.memory, world, device=device.kind)
    return config, build_fitted_setup(config, device.memory, world, device=device.kind)


def list_recompute_modes(config: Config, setup: TrainingSetup) -> list[Recompute]:
    """Those of RECOMPUTE_MODES that this model has and that differ: of transformers all or nothing; no n beyond the
    blocks. Compiled blocks already compute their cheap parts again, so that selective is the same as none."""
    if config.model.kind == "transformers":
        return ["none", "full"]
    modes: list[Recompute] = [
        mode for mode in RECOMPUTE_MODES if not isinstance(mode, int) or mode < setup.shape.layers
    ]
    if setup.compiled_blocks:
        modes.remove("selective")
    return modes
