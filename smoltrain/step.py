"""One training step, and the loss on held-out rows: collective, and the same on every rank."""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smoltrain import gradients
from smoltrain.data import Batch, Loader
from smoltrain.data.packing import NO_LABEL
from smoltrain.data.sketch import Sketch
from smoltrain.dist import World
from smoltrain.engine import Engine
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.plan import Plan
from smoltrain.track import SOURCE_TOKENS

WAIT_S, SAY_S = 5.0, 30.0  # for data: between reductions, between lines
MAX_SKIPS_IN_A_ROW = 50  # fp16's loss scale halves from 2^16 to 1 in 16 of them


@dataclass(frozen=True)
class StepResult:
    """What one training step measured, the same on every rank."""

    metrics: dict[str, Any]
    layers: dict[str, gradients.LayerGradient]
    num_skipped: int
    digests: np.ndarray  # uint64, of all rows that were consumed: more than one step's where updates were skipped


def train_step(
    step: int, engine: Engine, loader: Loader, plan: Plan, world: World, gradients_every: int = 0,
    *, stop: Callable[[], bool] = lambda: False, say: Callable[[str], None] = print,
) -> StepResult | None:  # fmt: skip
    """The step-th update: rows in, gradients of the global mean loss, one AdamW step. Collective.

    A step whose gradient is not finite is no step: its rows are spent, the skip is counted, the next rows are tried.
    None if `stop` told a rank to leave while it waited for data; nothing was updated then.
    Errors: TrainingStopped before the update when the loss is not finite; UserError where data cannot be read.
    """
    if plan.resets_optimizer(step):
        engine.reset_optimizer()
    loader.mix(plan.mix(step))
    lr, weight_decay = plan.lr(step), plan.weight_decay(step)
    digests: list[np.ndarray] = []
    while True:
        began = time.perf_counter()
        waited = wait_for_rows(loader, world, stop, say)
        if waited is None:
            return None
        taking = time.perf_counter()
        rows = loader.take()
        waited += time.perf_counter() - taking
        totals = loader.totals(world.sum_ints(*rows.counts))

        losses = []
        for batch in rows.micro_batches:
            loss = engine.forward(batch)  # sum over this micro-batch's tokens
            losses.append(loss.detach().double())
            # DeepSpeed's mean over ranks makes it the global mean.
            engine.backward(loss * (world.size / totals.num_targets))

        local = float(torch.stack(losses).sum())  # the step's one wait for the device before the update
        mean_loss = world.sum_floats(local)[0] / totals.num_targets
        if not math.isfinite(mean_loss):
            _stop_on(step, world.gather(local), lr, engine)
        inspecting = time.perf_counter()
        layers = gradients.by_layer(engine.gradients()) if plan.due(step, gradients_every) else {}
        inspected = time.perf_counter() - inspecting
        applied = engine.update(lr=lr, weight_decay=weight_decay)
        loader.consumed(totals)
        digests.append(totals.digests)
        if applied:
            break
        if len(digests) == MAX_SKIPS_IN_A_ROW:
            raise TrainingStopped(
                f"step {step}: {MAX_SKIPS_IN_A_ROW} updates in a row had a gradient that is not finite (lr {lr:g}); "
                "the last checkpoint is intact; try a lower lr, a longer warm-up, or precision bf16"
            )

    own = time.perf_counter() - began - inspected
    step_s, wait_share, peak = world.max_floats(own, waited / own, _peak_gib(world))
    return StepResult(
        {
            "train/loss_nats_per_token": mean_loss,
            "train/lr": lr,
            "train/weight_decay": weight_decay,
            "train/grad_norm_before_clipping": engine.grad_norm_before_clipping,
            "train/loss_scale": engine.loss_scale,
            **progress(loader),
            "speed/tokens_per_s": totals.num_targets / step_s,
            "speed/step_s": step_s,
            "speed/steps_per_s": 1 / step_s,
            "speed/data_wait_share": wait_share,
            "memory/peak_gib": peak,
        },
        layers,
        len(digests) - 1,
        np.concatenate(digests),
    )


def wait_for_rows(loader: Loader, world: World, stop: Callable[[], bool], say: Callable[[str], None]) -> float | None:
    """Wait until every rank has its next rows; seconds that this one's took. None if a rank is to stop. Collective.

    Ranks whose own rows are there ask again every few seconds instead of waiting in a reduction that would time out.
    Errors: UserError on every rank, where one of them cannot have its rows.
    """
    waited, last = 0.0, time.monotonic()
    while True:
        ready, problem, asked = False, None, time.perf_counter()
        try:
            ready = loader.ready(WAIT_S)
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
            for rank, what in enumerate(world.gather("" if ready else loader.health.waiting() or "rows")):
                if what:
                    say(f"rank {rank} waits for data: {what}")


def progress(loader: Loader) -> dict[str, float | str]:
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
        **{SOURCE_TOKENS + name: targets for name, targets in by_source.items()},
    }


def count_contents(loader: Loader, world: World) -> float:
    """How many different documents all ranks have begun, estimated. Collective."""
    for text in world.gather(loader.sketch.to_text()):
        loader.sketch.merge(Sketch.from_text(text))
    return loader.sketch.estimate()


def evaluate(engine: Engine, batches: list[Batch], bytes_per_id: torch.Tensor, world: World) -> tuple[float, float]:
    """Mean loss over the validation rows of all ranks: nats per token, and bits per UTF-8 byte. Collective."""
    with engine.evaluating():
        loss = sum(float(engine.forward(batch)) for batch in batches)
    labels = torch.cat([batch.labels_BT[batch.labels_BT != NO_LABEL] for batch in batches])
    loss, num_tokens, num_bytes = world.sum_floats(loss, len(labels), int(bytes_per_id[labels].sum()))
    return loss / num_tokens, loss / math.log(2) / num_bytes


def _stop_on(step: int, losses: list[float], lr: float, engine: Engine) -> None:
    """Name the ranks and the numbers of a loss that is not finite."""
    ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    norm = math.sqrt(sum(float(g.double().square().sum()) for _, g in engine.gradients()))
    raise TrainingStopped(
        f"the loss of step {step} is {losses[ranks[0]]} on rank {', '.join(map(str, ranks))} "
        f"(lr {lr:g}, gradient norm {norm:g}); nothing was updated and the last checkpoint is intact; "
        "try a lower lr, a longer warm-up, gradient_clipping 1.0, or look at the data of this step"
    )


def _peak_gib(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    if world.device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
