"""When the gradients of a step are reduced: once per step by OncePerStep, or as DeepSpeed has it. The one rule for it.

Pure functions of a filled DeepSpeed config and of the memory of a rank's device, so that engine and estimates cannot
disagree: the engine imports no estimate, and is told what one has found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from smoltrain.engine.deepspeed_json import config_precision, offloads_optimizer, zero_stage
from smoltrain.errors import Problem, UserError

GIB = 2**30


@dataclass(frozen=True)
class MemoryForSums:
    """What a rank's device is estimated to need with the sums of OncePerStep and without, and what a run may fill."""

    with_sums_bytes: float
    without_bytes: float  # but with DeepSpeed's buckets, which a small model's sums are smaller than
    usable_bytes: float

    @property
    def is_enough(self) -> bool:
        """Whether the sums fit, or at least need no more than what takes their place."""
        return self.with_sums_bytes <= max(self.usable_bytes, self.without_bytes)


@dataclass(frozen=True)
class ReductionChoice:
    """Whether gradients are reduced once per step by OncePerStep, else by DeepSpeed; and why, for the console."""

    once_per_step: bool
    reason: str


def choose_reduction(
    tree: Mapping[str, Any], *, device: str, requested: str, memory: MemoryForSums | None = None
) -> ReductionChoice:
    """The choice on this kind of device, for engine.reduce_gradients = `requested`: auto, step or micro_batch.

    `auto` is once per step on a CPU, and on a GPU whose `memory` has room for the sums; None: it was not estimated.
    A `step` that is impossible is answered with the reason; check_reduction refuses it before a run trains.
    """
    if impossible := why_not_once_per_step(tree):
        return ReductionChoice(False, impossible)
    if requested != "auto":
        return ReductionChoice(requested == "step", "as engine.reduce_gradients asks")
    if device == "cpu":
        return ReductionChoice(True, "auto, on a CPU")
    if memory is None:
        return ReductionChoice(True, "auto, though whether the sums fit was not estimated")
    sizes = f"{memory.with_sums_bytes / GIB:.2f} GiB with its sums of {memory.usable_bytes / GIB:.2f} GiB, as estimated"
    return ReductionChoice(memory.is_enough, f"auto: {sizes}")


def check_reduction(tree: Mapping[str, Any], requested: str) -> None:
    """Errors: UserError where engine.reduce_gradients = `requested` is step, and that is impossible."""
    impossible = why_not_once_per_step(tree)
    if requested == "step" and impossible:
        what = "gradients cannot be reduced once per step"
        want = "ZeRO-1 or 2 in fp32, ZeRO-2 in bf16, without offload; or auto"
        raise UserError(Problem(what, saw=impossible, want=want, change="engine.reduce_gradients"))


def why_not_once_per_step(tree: Mapping[str, Any]) -> str | None:
    """Reason once-per-step reduction is impossible, or None. `tree`: a filled DeepSpeed config."""
    stage, precision = zero_stage(tree), config_precision(tree)
    dtypes = gradient_dtypes(tree)
    if stage == 0:
        return "ZeRO-0 has no partitions"
    if stage == 3:
        return "ZeRO-3 is computed by DeepSpeedZeroOptimizer_Stage3"
    if offloads_optimizer(tree):
        return "the optimizer is offloaded"
    if dtypes != ("fp32", "fp32"):
        return f"it takes fp32 for both, and the DeepSpeed config has {dtypes}"
    if precision == "fp16":
        return "fp16 has a loss scale"
    if (stage, precision) == (1, "bf16"):
        return "ZeRO-1 in bf16 is computed by BF16_Optimizer"
    return None


class GradientDtypes(NamedTuple):
    """The precisions in which gradients are accumulated over micro-batches, and reduced over ranks."""

    accumulation: str
    reduction: str

    def __str__(self) -> str:
        if self.accumulation == self.reduction:
            return f"{self.accumulation} accumulation and reduction"
        return f"{self.accumulation} accumulation, {self.reduction} reduction"


def gradient_dtypes(tree: Mapping[str, Any]) -> GradientDtypes:
    """What a filled DeepSpeed config says; its default for both is the precision of the weights."""
    precision = config_precision(tree)
    accumulation = tree.get("data_types", {}).get("grad_accum_dtype") or precision
    return GradientDtypes(accumulation, tree.get("communication_data_type") or precision)


def gradient_sum_dtype(weights: torch.dtype, accumulation: int, world_size: int) -> torch.dtype:
    """The dtype of OncePerStep's sums: fp32, but for a lone micro-batch on a lone rank, which has nothing to add up.

    Its gradients have the dtype of the weights and stay so.
    """
    return weights if accumulation == world_size == 1 else torch.float32
