"""One training step, and the loss on held-out rows: collective, and the same on every rank."""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smoltrain.config.schema import SpikesSection
from smoltrain.data.rows.loader import Loader, StepRows, StepTotals
from smoltrain.data.rows.row_contents import RowContents
from smoltrain.distributed.world import World
from smoltrain.engine.engine import Engine
from smoltrain.engine.layer_gradients import LayerGradient, summarize_layer_gradients
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.kernels.loss import IGNORE_INDEX
from smoltrain.run.track import SOURCE_TOKENS_PREFIX
from smoltrain.schedule import Plan
from smoltrain.train.spikes import Spike, SpikeGuard

WAIT_S, SAY_S = 5.0, 30.0  # for data: between reductions, between lines
MAX_SKIPS_IN_A_ROW = 50  # fp16's loss scale halves from 2^16 to 1 in 16 of them


@dataclass(frozen=True)
class StepResult:
    """What one training step measured, the same on every rank."""

    metrics: dict[str, Any]
    layers: dict[str, LayerGradient]
    num_skipped: int
    digests: np.ndarray  # uint64, of all rows that were consumed: more than one step's where updates were skipped


def train_step(
    step: int, engine: Engine, loader: Loader, plan: Plan, world: World, gradients_every: int = 0,
    *, guard: SpikeGuard | None = None, stop: Callable[[], bool] = lambda: False, say: Callable[[str], None] = print,
    mark: Callable[[str], None] = lambda _: None, spent: Callable[[np.ndarray], None] = lambda _: None,
) -> StepResult | None:  # fmt: skip
    """The step-th update: rows in, gradients of the global mean loss, one AdamW step. Collective.

    A step whose gradient is not finite, or whose loss the guard lets skip, is no step: its rows are spent, the skip is
    counted, the next rows are tried. Rows that a rewind left out are spent too. `mark` hears of each place in the step.
    None if `stop` told a rank to leave while it waited for data; nothing was updated then, and `spent` was given the
    digests of the rows that were spent. Errors, before the update: spikes.Rewind or TrainingStopped for a spike
    (without a guard: a loss that is not finite); UserError where data cannot be read.
    """
    guard = guard or SpikeGuard(SpikesSection(), world)
    if plan.resets_optimizer(step):
        engine.reset_optimizer()
    loader.set_source_mix(plan.mix(step))
    lr, weight_decay = plan.lr(step), plan.weight_decay(step)
    digests: list[np.ndarray] = []
    num_spikes = num_bad_gradients = 0
    while True:
        began = time.perf_counter()
        waited = wait_for_rows(loader, world, stop, say, mark)
        if waited is None:
            spent(np.concatenate([np.empty(0, np.uint64), *digests]))
            return None
        taking = time.perf_counter()
        rows = loader.fetch_step_rows()
        waited += time.perf_counter() - taking
        mark("reduction")
        totals = loader.unpack_totals(world.sum_ints(*rows.counts))
        digests.append(totals.digests)
        if guard.is_row_skipped(loader.rows_consumed):
            loader.mark_consumed(totals)
            continue
        local = _accumulate_gradients(rows, totals, engine, world, mark)
        mark("reduction")
        mean_loss = world.sum_floats(local)[0] / totals.num_targets
        if why := guard.find_spike_reason(mean_loss):
            num_spikes += 1
            about = _describe_bad_step(world.gather(local), lr, engine)
            engine.drop_gradients()
            looked = _compute_row_losses(rows, engine, loader, world, mark)
            guard.handle_spike(Spike(step, mean_loss, why, about, num_spikes, *looked), say, loader.mix_begins)
            loader.mark_consumed(totals)
            continue
        inspecting = time.perf_counter()
        mark("gradients")
        layers = summarize_layer_gradients(engine.gradients()) if plan.is_due(step, gradients_every) else {}
        inspected = time.perf_counter() - inspecting
        mark("update")
        applied = engine.update(lr=lr, weight_decay=weight_decay)
        loader.mark_consumed(totals)
        if applied:
            guard.record_loss(mean_loss, loader.rows_consumed)
            break
        num_bad_gradients += 1
        if num_bad_gradients == MAX_SKIPS_IN_A_ROW:
            raise _too_many_skips_error(step, lr)

    own = time.perf_counter() - began - inspected
    step_s, wait_share, peak = world.max_floats(own, waited / own, _peak_memory_gib(world))
    metrics = {
        "train/loss_nats_per_token": mean_loss,
        "train/lr": lr,
        "train/weight_decay": weight_decay,
        "train/grad_norm_before_clipping": engine.grad_norm_before_clipping,
        "train/loss_scale": engine.loss_scale,
        **data_metrics(loader),
        "speed/tokens_per_s": totals.num_targets / step_s,
        "speed/step_s": step_s,
        "speed/steps_per_s": 1 / step_s,
        "speed/data_wait_share": wait_share,
        "memory/peak_gib": peak,
    }
    return StepResult(metrics, layers, len(digests) - 1, np.concatenate(digests))


def wait_for_rows(
    loader: Loader, world: World, stop: Callable[[], bool], say: Callable[[str], None],
    mark: Callable[[str], None] = lambda _: None,
) -> float | None:  # fmt: skip
    """Wait until every rank has its next rows; seconds that this one's took. None if a rank is to stop. Collective.

    Ranks whose own rows are there ask again every few seconds instead of waiting in a reduction that would time out.
    Errors: UserError on every rank, where one of them cannot have its rows.
    """
    waited, last = 0.0, time.monotonic()
    while True:
        mark("data")
        ready, problem, asked = False, None, time.perf_counter()
        try:
            ready = loader.wait_until_ready(WAIT_S)
        except UserError as error:
            problem = error
        waited += time.perf_counter() - asked
        failed, waiting, stopping = world.sum_ints(problem is not None, not ready, stop())
        if failed:
            raise next(error for error in world.gather(problem) if error)
        if not waiting:
            return waited
        if stopping:
            return None
        if time.monotonic() >= last + SAY_S:
            last = time.monotonic()
            for rank, what in enumerate(world.gather("" if ready else loader.health.describe_wait() or "rows")):
                if what:
                    say(f"rank {rank} waits for data: {what}")


def data_metrics(loader: Loader) -> dict[str, float | str]:
    """How far the run has come through its data."""
    known = {} if loader.epochs is None else {"data/epochs": loader.epochs}
    by_source = dict(zip(loader.sources, loader.source_targets, strict=True)) if len(loader.sources) > 1 else {}
    return known | {
        "data/rows": loader.rows_consumed,
        "data/tokens": loader.targets_consumed,
        "data/unique_rows": loader.unique_rows,
        "data/unique_documents": loader.unique_documents,
        "data/repeat_factor": loader.repeat_factor,
        "data/bad_records": loader.bad_records,
        "data/ledger": loader.ledger,
        **{SOURCE_TOKENS_PREFIX + name: targets for name, targets in by_source.items()},
    }


def _accumulate_gradients(
    rows: StepRows, totals: StepTotals, engine: Engine, world: World, mark: Callable[[str], None]
) -> float:
    """Forward and backward of this rank's rows; the sum of their token losses in nats."""
    losses = []
    for batch in rows.micro_batches:
        mark("forward")
        loss = engine.forward(batch)  # sum over this micro-batch's tokens
        losses.append(loss.detach().double())
        mark("backward")
        # DeepSpeed's mean over ranks makes it the global mean.
        engine.backward(loss * (world.size / totals.num_targets))
    return float(torch.stack(losses).sum())  # the step's one wait for the device before the update


# ---- what goes wrong


def _describe_bad_step(losses: list[float], lr: float, engine: Engine) -> str:
    """The ranks whose losses (one each) are not finite, and the numbers behind the step. Collective."""
    bad = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    norm = math.sqrt(sum(float(g.double().square().sum()) for _, g in engine.gradients()))
    return (f"on rank {', '.join(bad)} " if bad else "") + f"(lr {lr:g}, gradient norm {norm:g})"


def _compute_row_losses(
    rows: StepRows, engine: Engine, loader: Loader, world: World, mark: Callable[[str], None]
) -> tuple[list[RowContents], list[float]]:
    """All ranks' rows by position, with the mean loss of each alone, nats per token without dropout. Collective."""
    losses = []
    with engine.evaluation_mode():
        for batch in rows.micro_batches:
            for i in range(len(batch.ids_BT)):
                mark("forward")
                row = batch.slice_rows(i, i + 1)
                num_targets = int((row.labels_BT != IGNORE_INDEX).sum())
                losses.append(float(engine.forward(row)) / max(1, num_targets))
    mark("reduction")
    named = loader.describe_rows()
    everywhere = world.gather(list(zip(named, losses, strict=True)))
    pairs = sorted((pair for mine in everywhere for pair in mine), key=lambda pair: pair[0].position)
    return [row for row, _ in pairs], [loss for _, loss in pairs]


def _too_many_skips_error(step: int, lr: float) -> TrainingStopped:
    return TrainingStopped(
        f"step {step}: {MAX_SKIPS_IN_A_ROW} updates in a row had a gradient that is not finite (lr {lr:g}); "
        "the last checkpoint is intact; try a lower lr, a longer warm-up, or precision bf16"
    )


def _peak_memory_gib(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    if world.device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
