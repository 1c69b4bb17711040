"""Training steps, one after the other: collective, and the same on every rank.

Ranks exchange numbers twice in a step, for the arithmetic needs it:

before the forward pass   an all-reduce on the host of who is ready or is to stop, with the counts of the rows: the loss
                          is a mean over the valid tokens of all ranks, by whose number backward divides
before the update         an all-gather where the ranks compute, of each one's loss and squared gradient norm, with its
                          times: a spike must be met before it moves a weight, and clipping divides by the norm of the
                          whole gradient

Between machines each costs a round trip, so nothing else is exchanged in a step in which nothing is due. Where
DeepSpeed reduces the gradients it has collectives of its own.

What the second exchange says is decided on the device, by tensors: the update of a step that must not move anything is
masked. So the host need not wait for a GPU in order to go on. It reads what became of an update (session.reads_late)
when it has given the GPU the forward and backward passes of the next step, and before the next update. If nothing has
moved, these passes were those of the next rows by the same weights, which is just what comes after a step that is
skipped: they count as the next try of the same step. So late or at once, every number is the same; and whatever needs a
settled state (an evaluation, a checkpoint, a callback) has its step read at once.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from smoltrain.distributed.communication import StepCommunication
from smoltrain.engine.layer_gradients import summarize_layer_gradients
from smoltrain.kernels.device_numbers import DeviceMoment, ReturningNumbers, send_numbers
from smoltrain.training import bad_steps
from smoltrain.training.data_metrics import data_metrics
from smoltrain.training.session import Session
from smoltrain.training.spikes import Spike
from smoltrain.training.step_result import StepResult
from smoltrain.training.taken_rows import StopRequest, take_rows_together
from smoltrain.training.unread_update import PassesUnderWay, RankNumbers, UnreadUpdate, measure_step, peak_memory_gib

LARGEST_FLOAT = sys.float_info.max  # below inf


@dataclass
class Tries:
    """What was tried since the last step that is done."""

    digests: list[np.ndarray] = field(default_factory=list)  # of the rows of each try
    num_spikes: int = 0
    num_bad_gradients: int = 0

    def take_first(self, count: int) -> np.ndarray:
        """The digests of so many tries, which made a step; what comes after it is the next one's."""
        digests = _join_digests(self.digests[:count])
        self.digests = self.digests[count:]
        self.num_spikes = 0
        self.num_bad_gradients = 0
        return digests


def train_steps(
    steps: range, session: Session, is_awaited: Callable[[int], bool] = lambda _: True
) -> Iterator[tuple[int, StepResult]]:
    """(step, what it did) of each of these steps; the last one may be a stop. Collective.

    A result is given before anything of the next step has begun, if the step `is_awaited` or is the last one; of others
    it may come later, if session.reads_late.
    A step whose gradient is not finite, or whose loss the guard lets skip, is no step: its rows are consumed, the skip
    is counted, the next rows are tried. Rows that a rewind left out are consumed too.
    Errors, with the weights as before the update: spikes.Rewind or TrainingStopped for a spike; UserError where data
    cannot be read.
    """
    tries = Tries()
    unread: UnreadUpdate | None = None
    step = steps.start
    while step < steps.stop:
        passes = _start_passes(step, session, tries)
        if unread is not None:
            session.watchdog.mark("update")
            result = _finish_update(unread, session, tries)
            if result is None:  # then these passes are the next try of that step
                step = unread.step
            else:
                yield unread.step, result
        if isinstance(passes, StopRequest):
            yield step, StepResult(
                _join_digests(tries.digests), stopped=True, waited_for_data=passes.waited_for_data,
                num_skipped=len(tries.digests),
            )  # fmt: skip
            return
        unread = start_update(step, passes, session, tries)
        if session.reads_late and step != steps[-1] and not is_awaited(step):
            step += 1
            continue
        result = _finish_update(unread, session, tries)
        unread = None
        if result is not None:
            yield step, result
            step += 1


def _start_passes(step: int, session: Session, tries: Tries) -> PassesUnderWay | StopRequest:
    """Take the next rows that are to be trained on, and give the device their passes. Collective."""
    loader = session.loader
    session.watchdog.begin_step(step)
    if session.plan.resets_optimizer(step):  # a phase's first step: the one before it was awaited, and is saved
        session.engine.reset_optimizer()
    loader.set_source_mix(session.plan.mix(step))
    take_moment = functools.partial(DeviceMoment, session.world.device)
    while True:
        began = take_moment()
        communication = StepCommunication(take_moment)
        session.world.meter.record_into(communication)
        taken = take_rows_together(session)
        if isinstance(taken, StopRequest):
            return taken
        rows_came = take_moment()
        tries.digests.append(taken.totals.digests)
        if not session.guard.is_row_skipped(loader.rows_consumed):
            break
        loader.mark_consumed(taken.totals)
    losses = []
    for batch in taken.micro_batches:
        session.watchdog.mark("forward")
        loss = session.engine.forward(batch)  # sum over this micro-batch's tokens
        losses.append(loss.detach().double())
        session.watchdog.mark("backward")
        # The engine's mean over ranks makes it the global mean.
        session.engine.backward(loss * (session.world.size / taken.totals.num_targets))
    session.world.meter.record_into(None)
    return PassesUnderWay(taken, losses, began, rows_came, communication)


def start_update(step: int, passes: PassesUnderWay, session: Session, tries: Tries) -> UnreadUpdate:
    """Exchange the numbers of the passes, and have the device decide by them and update. Collective."""
    engine = session.engine
    loader = session.loader
    plan = session.plan
    taken = passes.taken
    meter = session.world.meter
    session.watchdog.mark("reduction")
    meter.record_into(passes.communication)
    squared_norm = engine.reduce()
    own = (taken.waited_s, peak_memory_gib(session.world), session.communication_s)
    from_host = send_numbers(own, squared_norm.device, torch.float64)
    from_device = torch.stack((torch.stack(passes.losses).sum(), squared_norm))
    everyones = session.world.gather_numbers(torch.cat((from_device, from_host)))  # as RankNumbers
    loss_sum, squared_norm, *_ = everyones.sum(0).unbind()
    mean_loss = loss_sum / taken.totals.num_targets
    largest = min(session.guard.largest_sound_loss(), LARGEST_FLOAT)
    is_sound = (mean_loss <= largest) & (mean_loss >= -LARGEST_FLOAT)  # not of nan

    meter.record_into(None)
    before_inspection = DeviceMoment(session.world.device)
    session.watchdog.mark("gradients")
    inspects = plan.is_due(step, session.config.track.gradients_every)
    layer_gradients = summarize_layer_gradients(engine.gradients) if inspects else {}
    update_meter = engine.watch_update() if inspects else None
    inspected = (before_inspection, DeviceMoment(session.world.device))
    meter.record_into(passes.communication)

    session.watchdog.mark("update")
    outcome = engine.start_update(
        lr=plan.lr(step), weight_decay=plan.weight_decay(step), squared_norm=squared_norm, is_allowed=is_sound
    )
    on_device = mean_loss.device
    verdict = torch.stack((mean_loss, outcome.gradient_norm.to(on_device), outcome.applied.to(on_device).double()))
    numbers = ReturningNumbers(torch.cat((everyones.flatten(), verdict)))
    ended = DeviceMoment(session.world.device)
    meter.record_into(None)
    layer_weights = update_meter.measure() if update_meter else {}
    mix_begins = loader.mix_begins
    describe_rows = loader.hold_rows()
    loader.mark_consumed(taken.totals)
    return UnreadUpdate(
        step, passes, numbers, len(tries.digests), loader.rows_consumed, mix_begins, data_metrics(loader),
        describe_rows, layer_gradients, layer_weights, inspected, ended,
    )  # fmt: skip


def _finish_update(update: UnreadUpdate, session: Session, tries: Tries) -> StepResult | None:
    """Read what became of an update; None if nothing has moved, and the step is to be tried once more. Collective.

    Errors: those of `train_steps` for a spike, and TrainingStopped where no gradient is finite any more.
    """
    *flat, mean_loss, gradient_norm, applied = update.numbers.read()
    width = len(RankNumbers._fields)
    ranks = [RankNumbers(*flat[i : i + width]) for i in range(0, len(flat), width)]
    session.engine.finish_update(bool(applied), gradient_norm)
    if applied:
        session.guard.record_loss(mean_loss, update.rows_consumed)
        digests = tries.take_first(update.num_tries)
        metrics = measure_step(update, mean_loss, ranks, session)
        session.communication_s = update.passes.communication.seconds()
        return StepResult(
            digests, metrics=metrics, layer_gradients=update.layer_gradients, layer_weights=update.layer_weights,
            num_skipped=update.num_tries - 1,
        )  # fmt: skip
    reason = session.guard.find_spike_reason(mean_loss)
    if reason is None:
        tries.num_bad_gradients += 1
        if tries.num_bad_gradients == bad_steps.MAX_SKIPS_IN_A_ROW:
            bad_steps.end_run_of_bad_gradients(update.step, mean_loss, update.rows_consumed, session)
        return None
    tries.num_spikes += 1
    about = bad_steps.describe_bad_step([rank.loss for rank in ranks], session.plan.lr(update.step), gradient_norm)
    rows, row_losses = bad_steps.compute_row_losses(update.passes.taken.micro_batches, update.describe_rows, session)
    spike = Spike(update.step, mean_loss, reason, about, tries.num_spikes, rows, row_losses)
    session.guard.handle_spike(spike, session.tracker.say, update.mix_begins)
    return None


def _join_digests(digests: list[np.ndarray]) -> np.ndarray:
    """Those of all tries, in order; there may be none."""
    return np.concatenate([np.empty(0, np.uint64), *digests])
