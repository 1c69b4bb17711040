"""When the gradients of a step are reduced: once per step by OncePerStep, or as DeepSpeed has it. The one rule for it.

Pure functions of a filled DeepSpeed config, so that engine and estimates cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from smoltrain.engine.deepspeed_json import config_precision, offloads_optimizer, zero_stage


@dataclass(frozen=True)
class ReductionChoice:
    """Whether gradients are reduced once per step by OncePerStep; if not, `reason` says why DeepSpeed does it."""

    once_per_step: bool
    reason: str | None = None


def choose_reduction(tree: Mapping[str, Any], *, device: str, requested: str) -> ReductionChoice:
    """The choice on this kind of device, for engine.reduce_gradients = `requested`: auto, step or micro_batch.

    A `step` that is impossible is answered with the reason; who is about to train refuses it then.
    """
    if impossible := why_not_once_per_step(tree):
        return ReductionChoice(False, impossible)
    if requested == "micro_batch":
        return ReductionChoice(False, "as engine.reduce_gradients asks")
    if requested == "auto" and device != "cpu":
        return ReductionChoice(False, "auto, on a GPU")
    return ReductionChoice(True)


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
