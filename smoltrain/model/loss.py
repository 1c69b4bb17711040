"""The training loss.

Legend: N tokens (rows of the batch, laid end to end), D width of the residual stream, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a token that is no target


def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The SUM of -log p(label) over all tokens whose label is not IGNORED, an fp32 scalar (0 if there is none).

    A sum, because only the caller knows the number of valid tokens over all micro-batches and ranks of a step.
    The labels are shifted already: labels_N[i] is the target of hidden_ND[i].
    """
    return summed_cross_entropy_of_logits(F.linear(hidden_ND, weight_VD), labels_N)


def summed_cross_entropy_of_logits(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """The same, for a model whose logits are more than a product (scaled or soft-capped ones)."""
    # In bf16 the log-softmax would be rounded to 3 digits.
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED, reduction="sum")
