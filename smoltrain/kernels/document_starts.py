"""Where packed documents begin, for the kernels that take places ("varlen"): in a tensor of one of five lengths.

torch.compile makes new code for each shape, and after eight of them (torch._dynamo.config.recompile_limit) it gives up.
So the places are padded with the number of tokens, which stands for documents of no token behind the last one:

- FlashAttention 2, and the copy of it behind torch's varlen_attn: every block of threads returns at once where its
  document is too short (flash_fwd_kernel.h: `m_block * kBlockM >= binfo.actual_seqlen_q`, flash_bwd_kernel.h and
  flash_bwd_preprocess_kernel.h alike).
- FlashAttention 3 and 4 give out blocks by the documents' lengths (tile_scheduler.hpp, cute/tile_scheduler.py), and are
  tested with documents of no token, the last one always (hopper/test_util.py: `zero_lengths`).

Such documents are not free: FlashAttention 2 starts T / 128 blocks of threads for each in every head, and its backward
pass sets 128 rows of fp32 aside for each (flash_api.cpp: `total_q + 128 * batch_size`). With room for as many documents
as tokens, 32,768 tokens of 9 heads 64 wide would take 9 GiB. Hence five lengths and not one: of many batches alike,
most have the same.

Legend: N tokens of all rows laid end to end.
"""

import math

import torch
from torch import Tensor

# Tokens of a document, at least: on average over a batch. The last fits any batch, so that no shape is a sixth.
MEAN_LENGTHS = (256, 64, 16, 4, 1)
LEAST_PADDED = 64  # documents; fewer would save nothing


def padded_length(num_documents: int, num_tokens: int) -> int:
    """How many documents there is room for, when there are so many in so many tokens."""
    for mean_length in MEAN_LENGTHS:
        room = max(min(LEAST_PADDED, num_tokens), math.ceil(num_tokens / mean_length))
        if num_documents <= room:
            return room
    raise AssertionError("a document has a token at least")


def find_document_starts(positions_BT: Tensor, num_documents: int | None = None) -> Tensor:
    """The place of each document's first token among the N of all rows, then N as often as it takes; int32.

    A document begins where the positions do, and never goes on in the next row. `num_documents`: how many there are
    at most, from who knows it without a device; None: it is counted, for which the host waits.
    """
    N = positions_BT.numel()
    begins_N = positions_BT.flatten() == 0
    if num_documents is None:
        num_documents = int(begins_N.sum())  # host-device sync
    room = padded_length(num_documents, N)
    # Each first token writes its place, in order; all other tokens write N behind the last.
    target_N = torch.where(begins_N, begins_N.cumsum(0) - 1, room)
    place_N = torch.arange(N, dtype=torch.int32, device=positions_BT.device)
    starts = torch.full((room + 1,), N, dtype=torch.int32, device=positions_BT.device)
    return starts.scatter_(0, target_N, torch.where(begins_N, place_N, N))
