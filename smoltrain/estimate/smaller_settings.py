"""Settings that take less of a rank's memory than those that did not fit, each with what it costs in time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from smoltrain.config.schema import Config
from smoltrain.estimate.constants import SPARE_SHARE
from smoltrain.estimate.fitting import list_recompute_modes, settle_reduction
from smoltrain.estimate.report import Estimate
from smoltrain.estimate.training_setup import TrainingSetup

ZERO_NAMES = {"zero1": 1, "zero2": 2, "zero3": 3}  # of which each reads the checkpoints of the others


@dataclass(frozen=True)
class SmallerSetting:
    """Overrides that are estimated to fit."""

    overrides: tuple[str, ...]
    memory_bytes: float  # of a rank, estimated; with `beyond_bytes`
    more_time: float  # share of a step's time on top; negative where it is estimated to be faster

    def __str__(self) -> str:
        """As a line of advice names it."""
        return f"{' '.join(self.overrides)} ({self.cost})"

    @property
    def cost(self) -> str:
        """Of time, in a word."""
        return f"{self.more_time:+.0%} time" if abs(self.more_time) >= 0.005 else "as fast"


def find_smaller_settings(
    estimate: Estimate, config: Config, limit_bytes: float, beyond_bytes: float = 0.0, count: int = 3
) -> list[SmallerSetting]:
    """Settings that fit, by the estimate, with the same rows in each step; at most so many, [] if nothing fits.

    `estimate` and `config` are those that did not fit, the config without any `auto`. `beyond_bytes` is what really was
    needed beyond the estimate, and is added to each. First come those that change as few keys as possible, no two the
    same ones, the fastest first; where these are fewer than `count`, others follow that leave more to spare.
    """
    usable = limit_bytes * (1 - SPARE_SHARE) - beyond_bytes
    now_s = estimate.speed.step_s
    fitting: list[SmallerSetting] = []
    for overrides, setup in _vary_setup(estimate.setup, config):
        other = replace(estimate, setup=settle_reduction(setup, limit_bytes))
        memory = other.memory.total
        if overrides and memory <= usable:
            fitting.append(SmallerSetting(overrides, memory + beyond_bytes, other.speed.step_s / now_s - 1))
    # Fewer keys first: what needs another change as well is of no use where the one alone is enough.
    fitting.sort(key=lambda one: (len(_changed_keys(one)), round(one.more_time, 3), one.memory_bytes))
    chosen: list[SmallerSetting] = []
    for setting in fitting:
        if not any(_changed_keys(one) <= _changed_keys(setting) for one in chosen):
            chosen.append(setting)
    chosen = sorted(chosen, key=lambda setting: setting.more_time)[:count]
    for setting in sorted(fitting, key=lambda setting: setting.more_time):  # for who wants more to spare
        if chosen and len(chosen) < count and setting.memory_bytes < 0.9 * min(one.memory_bytes for one in chosen):
            chosen.append(setting)
    return chosen


def _changed_keys(setting: SmallerSetting) -> set[str]:
    return {override.partition("=")[0] for override in setting.overrides} - {"batch.accumulation"}


def _vary_setup(setup: TrainingSetup, config: Config) -> Iterator[tuple[tuple[str, ...], TrainingSetup]]:
    """(overrides, the setup under them) for all that may be changed while a run goes on with the same rows."""
    for cheaper in _vary_computing(setup, config):
        for staged in _vary_zero_stage(cheaper[1], config):
            for split in _vary_micro_batch(staged[1], config):
                for mode in list_recompute_modes(config, setup):
                    recompute = () if mode == setup.recompute else (f"engine.gradient_checkpointing={mode}",)
                    yield (*cheaper[0], *staged[0], *split[0], *recompute), replace(split[1], recompute=mode)


def _vary_computing(setup: TrainingSetup, config: Config) -> Iterator[tuple[tuple[str, ...], TrainingSetup]]:
    """Logits a chunk at a time, where they are asked for as a whole; bf16 on a GPU."""
    yield (), setup
    if config.engine.loss == "plain" and config.model.kind == "decoder":
        yield ("engine.loss=fused",), replace(setup, loss="fused")
    # A CPU may have no arithmetic in bf16, and nobody has measured here what it costs then.
    if setup.device == "cuda" and setup.precision == "fp32" and config.engine.ds_config in ZERO_NAMES:
        yield ("engine.precision=bf16",), replace(setup, precision="bf16")


def _vary_zero_stage(setup: TrainingSetup, config: Config) -> Iterator[tuple[tuple[str, ...], TrainingSetup]]:
    yield (), setup
    if config.engine.ds_config not in ZERO_NAMES or setup.world == 1 or setup.newton_schulz_steps:
        return
    for name, stage in ZERO_NAMES.items():
        if stage > setup.stage:
            yield (f"engine.ds_config={name}",), setup.with_zero_stage(stage)


def _vary_micro_batch(setup: TrainingSetup, config: Config) -> Iterator[tuple[tuple[str, ...], TrainingSetup]]:
    yield (), setup
    for rows in range(1, setup.micro_batch):
        split = setup.with_micro_batch(rows)
        if split is None:
            continue
        keeps_rows = () if config.batch.rows_per_step else (f"batch.accumulation={split.accumulation}",)
        yield (f"batch.micro_batch={rows}", *keeps_rows), split
