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
    logits_NV = F.linear(hidden_ND, weight_VD).float()  # bf16 would round the log-softmax to 3 digits
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
