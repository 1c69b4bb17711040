"""What N ranks wrote, cut anew for M: plain dicts and tensors in and out, nothing of DeepSpeed's code.

ZeRO deals flat fp32 tensors (master weights, AdamW's moments) out to the ranks. Such a tensor is a row of segments, and
each segment is split into one part per rank, all of the same length, a multiple of `alignment`; what the last parts
hold beyond the segment's end is padding. Under ZeRO-1 and ZeRO-2 a parameter group is one segment. Under ZeRO-3 every
parameter is one, so that a rank has a stretch of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # as ZeRO-1 and ZeRO-2, or ZeRO-3, call them
ADAMW = ("base_optimizer_state", "optimizer_state_dict")


@dataclass(frozen=True)
class Layout:
    """How one flat tensor is dealt out."""

    segments: tuple[int, ...]  # elements of each, without padding
    alignment: int

    def parts(self, world: int) -> list[int]:
        """Elements of one rank's part of each segment, padding included."""
        step = self.alignment * world
        return [-(-size // step) * self.alignment for size in self.segments]


def stretches(size: int, old: int, new: int, rank: int) -> list[tuple[int, int, int]]:
    """Where this rank's part of a segment stands: (old rank, start, stop) within that rank's part, in order.

    `size` is the segment's, `old` and `new` are the lengths of a part. Padding is left out.
    """
    found, begin, end = [], rank * new, min((rank + 1) * new, size)
    while begin < end:
        source = begin // old
        stop = min(end, (source + 1) * old)
        found.append((source, begin - source * old, stop - source * old))
        begin = stop
    return found


def sources(layouts: Sequence[Layout], old: int, new: int, rank: int) -> list[int]:
    """The ranks of the old world whose shards this rank of the new one must read; at least one, for the counters."""
    needed = {
        source
        for layout in layouts
        for size, was, now in zip(layout.segments, layout.parts(old), layout.parts(new), strict=True)
        for source, _, _ in stretches(size, was, now, rank)
    }
    return sorted(needed) or [0]


def cut(parts: Mapping[int, torch.Tensor], layout: Layout, old: int, new: int, rank: int) -> torch.Tensor:
    """This rank's part of a flat tensor from the old ranks' parts, with zeros for padding."""
    pieces, begin = [], 0  # where the segment begins in every old part
    for size, was, now in zip(layout.segments, layout.parts(old), layout.parts(new), strict=True):
        filled = 0
        for source, start, stop in stretches(size, was, now, rank):
            pieces.append(parts[source].narrow(0, begin + start, stop - start))
            filled += stop - start
        pieces.append(next(iter(parts.values())).new_zeros(now - filled))
        begin += was
    return torch.cat(pieces)


def shard(
    shards: Mapping[int, dict[str, Any]], layouts: Sequence[Layout], old: int, new: int, rank: int
) -> dict[str, Any]:
    """The optimizer state of one of `new` ranks, from those of the `sources` among `old` ranks.

    `layouts` has one entry for each flat tensor, in the shards' order. What is no such tensor (step counts, the loss
    scale, hyperparameters) is the same on every rank and is taken from one of them.
    """
    first = next(iter(shards.values()))
    masters, adamw = (next(key for key in keys if key in first) for keys in (MASTERS, ADAMW))
    state: dict[int, dict[str, Any]] = {}
    for i, layout in enumerate(layouts):
        state[i] = dict(first[adamw]["state"][i])
        for name, value in state[i].items():
            if torch.is_tensor(value) and value.dim() > 0:
                assert value.numel() == sum(layout.parts(old)), f"DeepSpeed deals {name} out in another way than before"
                state[i][name] = cut({r: s[adamw]["state"][i][name] for r, s in shards.items()}, layout, old, new, rank)
    weights = [
        cut({r: s[masters][i] for r, s in shards.items()}, layout, old, new, rank) for i, layout in enumerate(layouts)
    ]
    return first | {masters: weights, adamw: first[adamw] | {"state": state}}
