"""The loss on held-out rows, over all ranks."""

import math

import torch

from smoltrain.data.rows.batch import Batch
from smoltrain.kernels.loss import IGNORE_INDEX
from smoltrain.training.session import Session


def evaluate_loss(session: Session, batches: list[Batch], bytes_per_id: torch.Tensor) -> tuple[float, float] | None:
    """Mean loss over the validation rows of all ranks: nats per token, and bits per UTF-8 byte. Collective.

    `batches` are this rank's, as many as every other's. None if a rank is to stop before they are done.
    """
    loss = 0.0
    with session.engine.evaluation_mode():
        for batch in batches:
            session.watchdog.mark("evaluation")
            if session.is_any_to_stop():
                return None
            loss += float(session.engine.forward(batch))
    labels = torch.cat([batch.labels_BT.flatten() for batch in batches])
    labels = labels[labels != IGNORE_INDEX]
    num_bytes = float(bytes_per_id[labels].sum())
    loss, num_tokens, num_bytes = session.world.sum_floats(loss, len(labels), num_bytes)
    return loss / num_tokens, loss / math.log(2) / num_bytes
