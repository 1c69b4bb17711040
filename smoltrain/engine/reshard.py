"""What N ranks wrote under one ZeRO stage, cut anew for M ranks under any other: plain dicts and tensors in and out.

ZeRO deals flat fp32 tensors (master weights, AdamW's moments) out to the ranks. Such a tensor is a row of segments, and
each segment is split into one part per rank, all of the same length, a multiple of `alignment`; what the last parts
hold beyond the segment's end is padding. Under ZeRO-1 and ZeRO-2 a parameter group is one tensor and one segment: its
parameters one after another, perhaps with gaps. Under ZeRO-3 every parameter is a segment, so that a rank has a stretch
of each, and a group may be several tensors. Whoever wrote it, an element is found by its parameter's name.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smoltrain.errors import Problem, UserError

MASTER_KEYS = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # as ZeRO-1 and ZeRO-2, or ZeRO-3, call them
ADAMW_KEYS = ("base_optimizer_state", "optimizer_state_dict")
GAPS_KEY = "param_alignment_paddings"  # of ZeRO-1 and ZeRO-2 with zero_optimization.parameter_alignment
LOSS_SCALER_KEY = "loss_scaler"  # not of ZeRO-1 in bf16, which DeepSpeed computes with a class of its own
ALIGNMENT = 2  # elements; of a part under ZeRO-1 and ZeRO-2

Segment = tuple[tuple[str, int, int], ...]  # parameter, its elements, the gap behind it


@dataclass(frozen=True)
class ParameterSlice:
    """Elements `first` up to, but without, `stop` of a parameter; they begin at `place` of a rank's flat tensor."""

    tensor: int
    name: str
    first: int
    stop: int
    place: int


@dataclass(frozen=True)
class ShardLayout:
    """How a world of ranks holds an optimizer state."""

    tensors: tuple[tuple[Segment, ...], ...]
    alignment: int
    world: int

    def parts(self, tensor: int) -> list[int]:
        """Elements of one rank's part of each segment, padding included."""
        step = self.alignment * self.world
        sizes = (sum(size + gap for _, size, gap in segment) for segment in self.tensors[tensor])
        return [-(-size // step) * self.alignment for size in sizes]

    def parameter_slices(self, rank: int) -> Iterator[ParameterSlice]:
        """What a rank holds, without padding and gaps."""
        for tensor, segments in enumerate(self.tensors):
            place = 0  # where the segment begins in the rank's flat tensor
            for segment, part in zip(segments, self.parts(tensor), strict=True):
                begin, end, at = rank * part, (rank + 1) * part, 0  # all within the segment
                for name, size, gap in segment:
                    first, stop = max(begin, at), min(end, at + size)
                    if first < stop:
                        yield ParameterSlice(tensor, name, first - at, stop - at, place + first - begin)
                    at += size + gap
                place += part

    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every parameter."""
        return {name: size for segments in self.tensors for segment in segments for name, size, _ in segment}


@dataclass(frozen=True)
class SliceCopy:
    """Elements start..stop of a flat tensor of one old rank, and where they begin in the new one."""

    rank: int
    tensor: int
    start: int
    stop: int
    place: int


def build_shard_layout(
    stage: int, shapes: Sequence[Mapping[str, torch.Size]], gaps: Sequence[Sequence[int]] | None, world: int
) -> ShardLayout:
    """From DeepSpeed's param_shapes, one mapping per flat tensor, and its gaps; None where there can be none."""
    groups = [[(name, shape.numel()) for name, shape in group.items()] for group in shapes]
    if stage == 3:
        return ShardLayout(tuple(tuple(((name, size, 0),) for name, size in group) for group in groups), 1, world)
    behind = gaps or [[0] * len(group) for group in groups]
    segments = (
        tuple((name, size, gap) for (name, size), gap in zip(group, some, strict=True))
        for group, some in zip(groups, behind, strict=True)
    )
    return ShardLayout(tuple((segment,) for segment in segments), ALIGNMENT, world)


def plan_slice_copies(wrote: ShardLayout, own: ShardLayout, rank: int) -> list[list[SliceCopy]]:
    """For each flat tensor of this rank where its elements stand among the ranks that wrote them.

    Errors: UserError if those wrote other parameters.
    """
    if wrote.parameter_sizes() != own.parameter_sizes():
        differing = sorted({name for name, _ in wrote.parameter_sizes().items() ^ own.parameter_sizes().items()})
        saw, want = f"{', '.join(differing[:3])} differ", "the parameters of this run's config"
        raise UserError(Problem("the optimizer state on disk is of another model", saw, want, "the checkpoint"))
    found: list[list[SliceCopy]] = [[] for _ in own.tensors]
    held: dict[str, list[tuple[int, ParameterSlice]]] = defaultdict(list)
    for source in range(wrote.world):
        for stretch in wrote.parameter_slices(source):
            held[stretch.name].append((source, stretch))
    for goal in own.parameter_slices(rank):
        for source, stretch in held[goal.name]:
            first, stop = max(goal.first, stretch.first), min(goal.stop, stretch.stop)
            if first < stop:
                start, length = stretch.place + first - stretch.first, stop - first
                place = goal.place + first - goal.first
                found[goal.tensor].append(SliceCopy(source, stretch.tensor, start, start + length, place))
    return found


def source_ranks(wrote: ShardLayout, own: ShardLayout, rank: int) -> list[int]:
    """The ranks of the old world whose shards this rank of the new one must read; at least one, for the counters."""
    return sorted({move.rank for tensor in plan_slice_copies(wrote, own, rank) for move in tensor}) or [0]


def reshard_optimizer_state(
    template: Mapping[str, Any],
    shards: Mapping[int, Mapping[str, Any]],
    wrote: ShardLayout,
    own: ShardLayout,
    rank: int,
) -> dict[str, Any]:
    """This rank's optimizer state, from those of the `sources`. New tensors, the old ones are not kept.

    `template` is the rank's own state of the moment: its form and hyperparameters stay, its numbers are replaced. Step
    counts and the loss scale are the same on every rank and are taken from one of them; a loss scale of another
    precision means nothing here. Errors: UserError where DeepSpeed dealt the numbers out in some other way.
    """
    first = next(iter(shards.values()))
    (masters, adamw), (own_masters, own_adamw) = _state_keys(first), _state_keys(template)
    for one in shards.values():
        _check_moment_sizes(one[adamw], wrote)
    routes = plan_slice_copies(wrote, own, rank)

    def cut(tensor: int, flat_of: Callable[[Mapping[str, Any], int], torch.Tensor]) -> torch.Tensor:
        flat = flat_of(first, 0).new_zeros(sum(own.parts(tensor)))
        for move in routes[tensor]:
            taken = flat_of(shards[move.rank], move.tensor)[move.start : move.stop]
            flat[move.place : move.place + len(taken)] = taken
        return flat

    state: dict[int, dict[str, Any]] = {}
    for i in range(len(own.tensors)):
        for name, value in first[adamw]["state"].get(0, {}).items():  # none before the first update
            flat = value.dim() > 0
            number = cut(i, lambda one, k, name=name: one[adamw]["state"][k][name]) if flat else value.clone()
            state.setdefault(i, {})[name] = number
    weights = [cut(i, lambda one, k: one[masters][k]) for i in range(len(own.tensors))]
    numbers: dict[str, Any] = {own_masters: weights, own_adamw: template[own_adamw] | {"state": state}}
    if type(first.get(LOSS_SCALER_KEY)) is type(template.get(LOSS_SCALER_KEY)):
        numbers[LOSS_SCALER_KEY] = first.get(LOSS_SCALER_KEY)
    return {**template, **numbers}


def _state_keys(state: Mapping[str, Any]) -> tuple[str, str]:
    """What this ZeRO stage calls the masters and AdamW's own state."""
    masters, adamw = (next(key for key in keys if key in state) for keys in (MASTER_KEYS, ADAMW_KEYS))
    return masters, adamw


def _check_moment_sizes(adamw: Any, wrote: ShardLayout) -> None:
    """Every moment is as long as its layout says; the masters are, but for padding that DeepSpeed leaves away."""
    if isinstance(adamw, dict):
        lengths = [sum(wrote.parts(tensor)) for tensor in range(len(wrote.tensors))]
        wrong = [
            f"{value.numel()} elements of {name}, not {lengths[tensor]}"
            for tensor, moments in adamw["state"].items()
            for name, value in moments.items()
            if value.dim() > 0 and value.numel() != lengths[tensor]
        ]
    else:
        wrong = ["a list of states"]  # with elastic_checkpoint
    if wrong:
        want = "flat tensors split evenly over all ranks"
        change = "zero_optimization in engine.ds_config and the number of ranks, back to what wrote the checkpoint"
        raise UserError(Problem("DeepSpeed dealt the optimizer state out in another way", wrong[0], want, change))
