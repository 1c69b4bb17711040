"""What goes wrong in a step: a loss that is a spike, with the rows that are to blame; gradients never finite."""

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

from smoltrain.data.rows.batch import Batch
from smoltrain.data.rows.row_contents import RowContents
from smoltrain.errors import TrainingStopped
from smoltrain.kernels.loss import IGNORE_INDEX
from smoltrain.training.session import Session

MAX_SKIPS_IN_A_ROW = 50  # fp16's loss scale halves from 2^16 to 1 in 16 of them


def describe_bad_step(losses: Sequence[float], lr: float, gradient_norm: float) -> str:
    """The ranks whose losses (one each) are not finite, and the numbers behind the step."""
    bad_ranks = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    numbers = f"(lr {lr:g}, gradient norm {gradient_norm:g})"
    return f"on rank {', '.join(bad_ranks)} {numbers}" if bad_ranks else numbers


def compute_row_losses(
    micro_batches: Sequence[Batch], describe_rows: Callable[[], list[RowContents]], session: Session
) -> tuple[list[RowContents], list[float]]:
    """All ranks' rows by position, with the mean loss of each alone, nats per token without dropout. Collective.

    By the weights of now, which are those of the step, as nothing was updated. `describe_rows`: those of this rank.
    """
    losses = []
    with session.engine.evaluation_mode():
        for batch in micro_batches:
            for i in range(len(batch.ids_BS)):
                session.watchdog.mark("forward")
                row = batch.slice_rows(i, i + 1)
                num_targets = int((row.labels_BT != IGNORE_INDEX).sum())
                losses.append(float(session.engine.forward(row)) / max(1, num_targets))
    session.watchdog.mark("reduction")
    everyones = session.world.gather(list(zip(describe_rows(), losses, strict=True)))
    pairs = [pair for ranks_pairs in everyones for pair in ranks_pairs]
    pairs.sort(key=lambda pair: pair[0].position)
    return [row for row, _ in pairs], [loss for _, loss in pairs]


def end_run_of_bad_gradients(step: int, loss: float, rows_consumed: int, session: Session) -> NoReturn:
    """Write into the journal that no update of this step was possible. Collective. Errors: TrainingStopped."""
    reason = f"{MAX_SKIPS_IN_A_ROW} updates in a row had a gradient that is not finite"
    session.guard.record_end(step, loss, reason, (rows_consumed - session.loader.layout.rows_per_step, rows_consumed))
    raise TrainingStopped(
        f"step {step}: {reason} (lr {session.plan.lr(step):g}); "
        "the last checkpoint is intact; try a lower lr, a longer warm-up, or precision bf16"
    )
