"""What to choose so that a run fits: pure functions of a config and the bytes there are."""

from dataclasses import replace
from typing import Any, Literal

from smoltrain.config.schema import Config
from smoltrain.estimate.case import Recompute, TrainingSetup, build_training_setup
from smoltrain.estimate.memory import estimate_memory

# By what they cost: no block again; every n-th; the cheap parts of all, which is little time but keeps a third; all.
RECOMPUTE_MODES: tuple[Recompute, ...] = ("none", "selective", 8, 4, 3, 2, "full")
# Tokens of a micro-batch beyond which none was faster: measured on CPUs (docs/performance.md), on GPUs a guess.
BUSY_TOKENS = {"cpu": 2048, "cuda": 32768}
SPARE_SHARE = 0.05  # of the memory, for what the estimate does not know


def fit_config_to_memory(
    config: Config, device_memory_bytes: float, world: int, *, device: Literal["cuda", "cpu"], **settled: Any
) -> Config:
    """The config with a value for what is `auto`: batch.micro_batch and engine.gradient_checkpointing.

    Where both are, rows are split so that nothing is computed again, as far as that fits. `device_memory_bytes` is
    what one rank may use: of a CPU, the machine's memory over its ranks. `settled` and errors: as `case`.
    """
    batch, engine = config.batch, config.engine
    if batch.micro_batch == "auto":
        keep = "none" if engine.gradient_checkpointing == "auto" else None
        n = choose_micro_batch(config, device_memory_bytes, world, device=device, recompute=keep, **settled)
        config = config.model_copy(update={"batch": batch.model_copy(update={"micro_batch": n})})
    if engine.gradient_checkpointing == "auto":
        mode = find_least_recomputation(config, device_memory_bytes, world, device=device, **settled)
        config = config.model_copy(update={"engine": engine.model_copy(update={"gradient_checkpointing": mode})})
    return config


def find_least_recomputation(
    config: Config, device_memory_bytes: float, world: int, *, device: Literal["cuda", "cpu"], **settled: Any
) -> Recompute:
    """The value of engine.gradient_checkpointing that computes least again and fits one rank; full if none fits.

    What the config itself says of gradient checkpointing is not looked at. `settled` and errors: as `case`.
    """
    asked = build_training_setup(config, world=world, device=device, **settled)
    ways = (replace(asked, recompute=mode) for mode in list_recompute_modes(config, asked))
    found: list[Recompute] = [way.recompute for way in ways if fits_memory(way, device_memory_bytes)]
    return found[0] if found else "full"


def choose_micro_batch(
    config: Config, device_memory_bytes: float, world: int, *, device: Literal["cuda", "cpu"],
    recompute: Recompute | None = None, **settled: Any,
) -> int:  # fmt: skip
    """The batch.micro_batch that splits a rank's rows of a step: of those that fit, the smallest that keeps the device
    busy, else the largest; 1 if none fits.

    `recompute` takes the place of engine.gradient_checkpointing. `settled` and errors: as `case`.
    """
    asked = build_training_setup(config, world=world, device=device, **settled)
    asked = asked if recompute is None else replace(asked, recompute=recompute)
    rows = asked.micro_batch * asked.accumulation
    splits = (split for n in range(1, rows + 1) if (split := asked.split(n)))
    fitting = [split for split in splits if fits_memory(split, device_memory_bytes)]
    busy = [split.micro_batch for split in fitting if split.tokens >= BUSY_TOKENS[device]]
    return busy[0] if busy else max((split.micro_batch for split in fitting), default=1)


def fits_memory(asked: TrainingSetup, device_memory_bytes: float) -> bool:
    """Whether the estimate leaves SPARE free."""
    return estimate_memory(asked).total <= device_memory_bytes * (1 - SPARE_SHARE)


def list_recompute_modes(config: Config, asked: TrainingSetup) -> list[Recompute]:
    """Those of MODES that this model has and that differ: of transformers all or nothing; no n beyond the blocks.

    Compiled blocks already compute their cheap parts again, so that selective is the same as none.
    """
    if config.model.kind == "transformers":
        return ["none", "full"]
    layers = asked.shape.layers
    chosen: list[Recompute] = [mode for mode in RECOMPUTE_MODES if not isinstance(mode, int) or mode < layers]
    return [mode for mode in chosen if mode != "selective" or not asked.compiled_blocks]
