"""TODO: moved out of step.py."""

import math
from collections.abc import Callable

import torch

from smoltrain.data.rows.loader import Batch
from smoltrain.distributed.world import World
from smoltrain.engine.engine import Engine
from smoltrain.kernels.loss import IGNORE_INDEX


def evaluate_loss(
    engine: Engine, batches: list[Batch], bytes_per_id: torch.Tensor, world: World,
    *, stop: Callable[[], bool] = lambda: False, mark: Callable[[str], None] = lambda _: None,
) -> tuple[float, float] | None:  # fmt: skip
    """Mean loss over the validation rows of all ranks: nats per token, and bits per UTF-8 byte. Collective.

    None if `stop` told a rank to leave meanwhile. `mark` hears of each batch.
    """
    loss = 0.0
    with engine.evaluation_mode():
        for batch in batches:
            mark("evaluation")
            if world.sum_ints(stop())[0]:
                return None
            loss += float(engine.forward(batch))
    labels = torch.cat([batch.labels_BT[batch.labels_BT != IGNORE_INDEX] for batch in batches])
    loss, num_tokens, num_bytes = world.sum_floats(loss, len(labels), float(bytes_per_id[labels].sum()))
    return loss / num_tokens, loss / math.log(2) / num_bytes
