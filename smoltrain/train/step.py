"""One training step: collective, and the same on every rank.

Ranks exchange host numbers twice in a step, for the arithmetic needs it:

before the forward pass   an all-reduce of who is ready or is to stop, with the counts of the rows: the loss is a mean
                          over the valid tokens of all ranks, by whose number backward divides
before the update         an all-gather of each rank's loss and squared gradient norm, with its times: a spike must be
                          met before it moves a weight, and clipping divides by the norm of the whole gradient

Between machines each costs a round trip, so nothing else is exchanged in a step in which nothing is due. Where
DeepSpeed reduces the gradients it has collectives of its own.
"""

import math
import resource
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch

from smoltrain.data.rows.batch import Batch
from smoltrain.data.rows.loader import StepRows, StepTotals
from smoltrain.data.rows.row_contents import RowContents
from smoltrain.distributed.world import World
from smoltrain.engine.engine import Engine
from smoltrain.engine.layer_gradients import LayerGradient, summarize_layer_gradients
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.kernels.loss import IGNORE_INDEX
from smoltrain.train.data_metrics import data_metrics
from smoltrain.train.spikes import Spike

if TYPE_CHECKING:  # which opens what a step works on, and imports this module
    from smoltrain.train.session import Session

WAIT_S = 1.0  # for this rank's rows, before the ranks tell each other how they stand
POLL_S = 0.2  # between two looks at whether this rank is to stop meanwhile
SAY_S = 30.0  # between two lines that say who waits for data
MAX_SKIPS_IN_A_ROW = 50  # fp16's loss scale halves from 2^16 to 1 in 16 of them


@dataclass(frozen=True)
class StepResult:
    """What one training step did; the same on every rank, but for the times and the memory among its metrics."""

    digests: np.ndarray  # uint64, of all rows that were consumed: more than one step's where updates were skipped
    stopped: bool = False  # a rank is to stop: nothing was updated, the other fields say nothing
    waited_for_data: bool = False  # when it was stopped
    metrics: dict[str, Any] = field(default_factory=dict)
    layer_gradients: dict[str, LayerGradient] = field(default_factory=dict)
    num_skipped: int = 0


@dataclass(frozen=True)
class TakenRows:
    """The next rows of this rank, when every rank has its own."""

    micro_batches: list[Batch]
    totals: StepTotals
    waited_s: float  # for this rank's rows


@dataclass(frozen=True)
class StopRequest:
    """Some rank is to stop, so all do."""

    waited_for_data: bool


class RankNumbers(NamedTuple):
    """What each rank tells the others before the update."""

    loss: float  # nats, summed over its tokens
    squared_norm: float  # of its part of the gradient; 0 where DeepSpeed takes the norm
    waited_s: float  # for rows
    peak_gib: float  # memory so far


def train_step(step: int, session: "Session") -> StepResult:
    """The step-th update: rows in, gradients of the global mean loss, one step of the optimizer. Collective.

    A step whose gradient is not finite, or whose loss the guard lets skip, is no step: its rows are consumed, the skip
    is counted, the next rows are tried. Rows that a rewind left out are consumed too.
    Errors, before the update: spikes.Rewind or TrainingStopped for a spike; UserError where data cannot be read.
    """
    engine = session.engine
    loader = session.loader
    guard = session.guard
    plan = session.plan
    if plan.resets_optimizer(step):  # a phase's first step: the state before it is saved already
        engine.reset_optimizer()
    loader.set_source_mix(plan.mix(step))
    digests: list[np.ndarray] = []
    num_spikes = 0
    num_bad_gradients = 0
    while True:
        began_s = time.perf_counter()
        taken = take_rows_together(session)
        if isinstance(taken, StopRequest):
            return StepResult(_join_digests(digests), stopped=True, waited_for_data=taken.waited_for_data)
        digests.append(taken.totals.digests)
        if guard.is_row_skipped(loader.rows_consumed):
            loader.mark_consumed(taken.totals)
            continue

        # ---- gradients, and a loss that must be one to learn from: nothing has moved yet
        numbers = _compute_gradients(taken, session)
        mean_loss = sum(rank.loss for rank in numbers) / taken.totals.num_targets
        spike_reason = guard.find_spike_reason(mean_loss)
        if spike_reason:
            num_spikes += 1
            about = _describe_bad_step([rank.loss for rank in numbers], plan.lr(step), engine)
            engine.drop_gradients()
            rows, row_losses = _compute_row_losses(taken.micro_batches, session)
            spike = Spike(step, mean_loss, spike_reason, about, num_spikes, rows, row_losses)
            guard.handle_spike(spike, session.tracker.say, loader.mix_begins)
            loader.mark_consumed(taken.totals)
            continue
        inspecting_s = time.perf_counter()
        session.watchdog.mark("gradients")
        inspects = plan.is_due(step, session.config.track.gradients_every)
        layer_gradients = summarize_layer_gradients(engine.gradients) if inspects else {}
        inspected_s = time.perf_counter() - inspecting_s

        # ---- the update
        session.watchdog.mark("update")
        squared_norm = sum(rank.squared_norm for rank in numbers)
        applied = engine.update(lr=plan.lr(step), weight_decay=plan.weight_decay(step), squared_norm=squared_norm)
        loader.mark_consumed(taken.totals)
        if applied:
            guard.record_loss(mean_loss, loader.rows_consumed)
            break
        num_bad_gradients += 1
        if num_bad_gradients == MAX_SKIPS_IN_A_ROW:
            _end_run_of_bad_gradients(step, mean_loss, session)

    # Each rank has waited for the slowest one in the collectives, so its own clock tells that one's time. Memory grows
    # in the update, after the exchange: this rank's peak is of now, the others' of before it.
    step_s = time.perf_counter() - began_s - inspected_s
    tokens_per_s = taken.totals.num_targets / step_s
    metrics = {
        "train/loss_nats_per_token": mean_loss,
        "train/lr": plan.lr(step),
        "train/weight_decay": plan.weight_decay(step),
        "train/grad_norm_before_clipping": engine.grad_norm_before_clipping,
        "train/loss_scale": engine.loss_scale,
        **data_metrics(loader),
        "speed/tokens_per_s": tokens_per_s,
        **(session.mfu.measure(tokens_per_s) if session.mfu else {}),
        "speed/step_s": step_s,
        "speed/steps_per_s": 1 / step_s,
        "speed/data_wait_share": max(rank.waited_s for rank in numbers) / step_s,
        "memory/peak_gib": max(_peak_memory_gib(session.world), *(rank.peak_gib for rank in numbers)),
    }
    return StepResult(
        _join_digests(digests), metrics=metrics, layer_gradients=layer_gradients, num_skipped=len(digests) - 1
    )


def take_rows_together(session: "Session") -> TakenRows | StopRequest:
    """Wait until every rank has its next rows, or one of them is to stop. Collective: one all-reduce if nobody waits.

    Ranks whose own rows are there ask again every second instead of waiting in a reduction that would time out. A rank
    that is to stop waits for no data. Errors: UserError on every rank, where one of them cannot have its rows.
    """
    loader = session.loader
    world = session.world
    rows: StepRows | None = None
    waited_s = 0.0
    waited_for_data = False
    last_said_s = time.monotonic()
    while True:
        session.watchdog.mark("data")
        problem: UserError | None = None
        began_s = time.perf_counter()
        try:
            if rows is None and _wait_for_own_rows(session):
                rows = loader.fetch_step_rows()
        except UserError as error:
            problem = error
        waited_s += time.perf_counter() - began_s
        session.watchdog.mark("reduction")
        counts = rows.counts if rows else [0] * loader.num_counts
        stops = session.stop.is_raised()
        num_stops, num_problems, num_waiting, *sums = world.sum_ints(stops, problem is not None, rows is None, *counts)
        if num_stops:
            return StopRequest(waited_for_data)
        if num_problems:
            raise next(error for error in world.gather(problem) if error)
        if rows and not num_waiting:
            return TakenRows(rows.micro_batches, loader.unpack_totals(sums), waited_s)
        waited_for_data = True
        if time.monotonic() >= last_said_s + SAY_S:
            last_said_s = time.monotonic()
            waits = None if rows else loader.health.describe_wait() or "rows"
            for rank, what in enumerate(world.gather(waits)):
                if what:
                    session.tracker.say(f"rank {rank} waits for data: {what}")


def _wait_for_own_rows(session: "Session") -> bool:
    """Whether this rank's rows are there, after at most WAIT_S; False at once if it is to stop."""
    deadline_s = time.monotonic() + WAIT_S
    while not session.stop.is_raised():
        if session.loader.wait_until_ready(min(POLL_S, WAIT_S)):
            return True
        if time.monotonic() >= deadline_s:
            return False
    return False


def _compute_gradients(taken: TakenRows, session: "Session") -> list[RankNumbers]:
    """Forward and backward of this rank's micro-batches, and the numbers of every rank, in rank order. Collective."""
    losses = []
    for batch in taken.micro_batches:
        session.watchdog.mark("forward")
        loss = session.engine.forward(batch)  # sum over this micro-batch's tokens
        losses.append(loss.detach().double())
        session.watchdog.mark("backward")
        # The engine's mean over ranks makes it the global mean.
        session.engine.backward(loss * (session.world.size / taken.totals.num_targets))
    session.watchdog.mark("reduction")
    squared_norm = session.engine.reduce()
    loss_sum = float(torch.stack(losses).sum())  # waits for the device
    everyones = session.world.gather_floats(loss_sum, squared_norm, taken.waited_s, _peak_memory_gib(session.world))
    return [RankNumbers(*numbers) for numbers in everyones]


def _join_digests(digests: list[np.ndarray]) -> np.ndarray:
    """Those of all tries, in order; there may be none."""
    return np.concatenate([np.empty(0, np.uint64), *digests])


# ---- what goes wrong


def _describe_bad_step(losses: list[float], lr: float, engine: Engine) -> str:
    """The ranks whose losses (one each) are not finite, and the numbers behind the step. Collective."""
    bad_ranks = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    squares = [float(gradient.double().square().sum()) for _, gradient in engine.gradients()]
    numbers = f"(lr {lr:g}, gradient norm {math.sqrt(sum(squares)):g})"
    return f"on rank {', '.join(bad_ranks)} {numbers}" if bad_ranks else numbers


def _compute_row_losses(micro_batches: list[Batch], session: "Session") -> tuple[list[RowContents], list[float]]:
    """All ranks' rows by position, with the mean loss of each alone, nats per token without dropout. Collective."""
    losses = []
    with session.engine.evaluation_mode():
        for batch in micro_batches:
            for i in range(len(batch.ids_BT)):
                session.watchdog.mark("forward")
                row = batch.slice_rows(i, i + 1)
                num_targets = int((row.labels_BT != IGNORE_INDEX).sum())
                losses.append(float(session.engine.forward(row)) / max(1, num_targets))
    session.watchdog.mark("reduction")
    own_rows = session.loader.describe_rows()
    everyones = session.world.gather(list(zip(own_rows, losses, strict=True)))
    pairs = [pair for ranks_pairs in everyones for pair in ranks_pairs]
    pairs.sort(key=lambda pair: pair[0].position)
    return [row for row, _ in pairs], [loss for _, loss in pairs]


def _end_run_of_bad_gradients(step: int, loss: float, session: "Session") -> NoReturn:
    """Write into the journal that no update of this step was possible. Collective. Errors: TrainingStopped."""
    reason = f"{MAX_SKIPS_IN_A_ROW} updates in a row had a gradient that is not finite"
    end = session.loader.rows_consumed
    session.guard.record_end(step, loss, reason, (end - session.loader.layout.rows_per_step, end))
    raise TrainingStopped(
        f"step {step}: {reason} (lr {session.plan.lr(step):g}); "
        "the last checkpoint is intact; try a lower lr, a longer warm-up, or precision bf16"
    )


def _peak_memory_gib(world: World) -> float:
    """This rank's peak so far."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    if world.device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
