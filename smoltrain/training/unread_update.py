"""An update that the device was given, before the host has read what became of it; and the metrics of its step then."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch

from smoltrain.data.rows.row_contents import RowContents
from smoltrain.distributed.communication import StepCommunication
from smoltrain.distributed.memory_limits import read_peak_resident_bytes
from smoltrain.distributed.world import World
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.engine.layer_weights import LayerWeight
from smoltrain.kernels.device_numbers import DeviceMoment, ReturningNumbers
from smoltrain.training.session import Session
from smoltrain.training.taken_rows import TakenRows


class RankNumbers(NamedTuple):
    """What each rank tells the others before the update."""

    loss: float  # nats, summed over its tokens
    squared_norm: float  # of its part of the gradient; 0 where DeepSpeed takes the norm
    waited_s: float  # for rows
    peak_gib: float  # memory so far
    communication_s: float  # in collectives, of the last step that was measured; nan before there was one


@dataclass(frozen=True)
class PassesUnderWay:
    """Forward and backward passes that the device was given, whose gradients are to be a step's."""

    taken: TakenRows
    losses: list[torch.Tensor]  # of each micro-batch, summed over its tokens
    began: DeviceMoment
    rows_came: DeviceMoment
    communication: StepCommunication


@dataclass(frozen=True)
class UnreadUpdate:
    """An update that was started, and what there is to say of its step when the host reads what became of it."""

    step: int
    passes: PassesUnderWay
    numbers: ReturningNumbers  # RankNumbers of each rank; mean loss, norm of the gradient, whether it was applied
    num_tries: int  # of the step, this one too
    rows_consumed: int  # after it
    mix_begins: int
    data_metrics: dict[str, float | str]
    describe_rows: Callable[[], list[RowContents]]
    layer_gradients: dict[str, LayerGradient]
    layer_weights: dict[str, LayerWeight]
    inspected: tuple[DeviceMoment, DeviceMoment]  # from when to when its gradients were looked at
    ended: DeviceMoment


def measure_step(update: UnreadUpdate, mean_loss: float, ranks: list[RankNumbers], session: Session) -> dict[str, Any]:
    """The metrics of a step that was applied.

    Each rank has waited for the slowest one in the collectives, so its own clock tells that one's time. Memory grows in
    the update, after the exchange: this rank's peak is of now, the others' of before it. A GPU that had work left has
    not waited for rows, though its host has.
    """
    passes = update.passes
    before_inspection, after_inspection = update.inspected
    step_s = update.ended.seconds_since(passes.began) - after_inspection.seconds_since(before_inspection)
    waited_s = min(max(rank.waited_s for rank in ranks), passes.rows_came.seconds_since(passes.began))
    tokens_per_s = passes.taken.totals.num_targets / step_s
    return {
        "train/loss_nats_per_token": mean_loss,
        "train/lr": session.plan.lr(update.step),
        "train/weight_decay": session.plan.weight_decay(update.step),
        "train/grad_norm_before_clipping": session.engine.grad_norm_before_clipping,
        "train/loss_scale": session.engine.loss_scale,
        **update.data_metrics,
        "speed/tokens_per_s": tokens_per_s,
        **(session.mfu.measure(tokens_per_s) if session.mfu else {}),
        "speed/step_s": step_s,
        "speed/steps_per_s": 1 / step_s,
        "speed/data_wait_share": waited_s / step_s,
        **_measure_communication(passes.communication, ranks),
        "memory/peak_gib": max(peak_memory_gib(session.world), *(rank.peak_gib for rank in ranks)),
    }


def _measure_communication(communication: StepCommunication, ranks: list[RankNumbers]) -> dict[str, float]:
    """Bytes of this step, seconds of the one before: a step's last collectives come after its exchange of numbers.

    Whoever comes last to a collective waits for nobody, so that the rank with the fewest seconds tells those of the
    network; what others wait beyond it they wait for slower ranks.
    """
    if len(ranks) == 1:
        return {}
    metrics = {"speed/communication_mb": communication.sent_bytes / 1e6}
    seconds = [rank.communication_s for rank in ranks]
    if not math.isnan(sum(seconds)):
        metrics["speed/communication_s"] = min(seconds)
        metrics["speed/rank_wait_s"] = fmean(seconds) - min(seconds)
    return metrics


def peak_memory_gib(world: World) -> float:
    """This rank's peak so far."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    if world.device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return read_peak_resident_bytes() / 2**30
