"""Reshards ZeRO optimizer state between world sizes and stages: plain dicts and tensors in and out, without DeepSpeed.

ZeRO partitions flat fp32 tensors (master weights, and the tensors of the optimizer's state) among the
ranks. Such a tensor is a row of segments, and each segment is split into one part per rank, all of the same
length, a multiple of `alignment`; what the last parts hold beyond the segment's end is padding. Under
ZeRO-1 and ZeRO-2 a parameter group is one tensor and one segment: its parameters one after another, perhaps
with gaps. Under ZeRO-3 every parameter is a segment, so that a rank has a slice of each, and a group may be
several tensors. Whoever wrote it, an element is found by its parameter's name.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smoltrain.engine.optimizer_kind import is_elementwise_state
from smoltrain.errors import Problem, UserError

# Keys of DeepSpeed's files, as ZeRO-1 and ZeRO-2, or ZeRO-3, call them. deepspeed_private.py compares them.
MASTER_KEYS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
OPTIMIZER_KEYS = ("base_optimizer_state", "optimizer_state_dict")
GAPS_KEY = "param_alignment_paddings"  # of ZeRO-1 and ZeRO-2 with zero_optimization.parameter_alignment
LOSS_SCALER_KEY = "loss_scaler"  # not of ZeRO-1 in bf16, which DeepSpeed computes with a class of its own
FROZEN_KEY = "frozen_param_fragments"  # weights that are not trained; under ZeRO-3 each rank's own parts
ALIGNMENT = 2  # elements; of a part under ZeRO-1 and ZeRO-2

Segment = tuple[tuple[str, int, int], ...]  # parameter, its elements, the gap behind it


@dataclass(frozen=True)
class ParameterSlice:
    """Elements `first` up to, but without, `stop` of a parameter; they begin at `offset` of a rank's flat tensor."""

    tensor: int
    name: str
    first: int
    stop: int
    offset: int


@dataclass(frozen=True)
class ShardLayout:
    """How a world of ranks holds an optimizer state: for each flat tensor its segments."""

    tensors: tuple[tuple[Segment, ...], ...]
    alignment: int
    world_size: int

    def part_sizes(self, tensor: int) -> list[int]:
        """Elements of one rank's part of each segment, padding included."""
        step = self.alignment * self.world_size
        sizes = (sum(size + gap for _, size, gap in segment) for segment in self.tensors[tensor])
        return [-(-size // step) * self.alignment for size in sizes]

    def shard_size(self, tensor: int) -> int:
        """Elements of a flat tensor that one rank holds, padding included."""
        return sum(self.part_sizes(tensor))

    def parameter_slices(self, rank: int) -> Iterator[ParameterSlice]:
        """What a rank holds, without padding and gaps."""
        for tensor, segments in enumerate(self.tensors):
            part_offset = 0  # where the segment's part begins in what the rank holds
            for segment, part_size in zip(segments, self.part_sizes(tensor), strict=True):
                # Within the segment: the rank's part is begin..end, the parameter begins at `position`.
                begin = rank * part_size
                end = begin + part_size
                position = 0
                for name, size, gap in segment:
                    first = max(begin, position)
                    stop = min(end, position + size)
                    if first < stop:
                        offset = part_offset + first - begin
                        yield ParameterSlice(tensor, name, first - position, stop - position, offset)
                    position += size + gap
                part_offset += part_size

    def parameter_names(self, tensor: int) -> set[str]:
        """The parameters that lie in a flat tensor."""
        return {name for segment in self.tensors[tensor] for name, _, _ in segment}

    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every parameter."""
        return {name: size for segments in self.tensors for segment in segments for name, size, _ in segment}


@dataclass(frozen=True)
class SliceCopy:
    """Elements start..stop of a flat tensor of one old rank, and their offset in the new one."""

    rank: int
    tensor: int
    start: int
    stop: int
    offset: int


def build_shard_layout(
    stage: int, shapes: Sequence[Mapping[str, torch.Size]], gaps: Sequence[Sequence[int]] | None, world_size: int
) -> ShardLayout:
    """From DeepSpeed's param_shapes, one mapping per flat tensor, and its gaps; None where there can be none."""
    groups = [[(name, shape.numel()) for name, shape in group.items()] for group in shapes]
    if stage == 3:
        tensors = tuple(tuple(((name, size, 0),) for name, size in group) for group in groups)
        return ShardLayout(tensors, 1, world_size)
    all_gaps = gaps or [[0] * len(group) for group in groups]
    segments = [
        tuple((name, size, gap) for (name, size), gap in zip(group, group_gaps, strict=True))
        for group, group_gaps in zip(groups, all_gaps, strict=True)
    ]
    return ShardLayout(tuple((segment,) for segment in segments), ALIGNMENT, world_size)


def plan_slice_copies(old: ShardLayout, new: ShardLayout, rank: int) -> list[list[SliceCopy]]:
    """For each flat tensor of this rank of the new layout, where its elements are among the ranks of the old one.

    Errors: UserError if the two layouts hold other parameters.
    """
    if old.parameter_sizes() != new.parameter_sizes():
        differing = sorted({name for name, _ in old.parameter_sizes().items() ^ new.parameter_sizes().items()})
        saw = f"{', '.join(differing[:3])} differ"
        want = "the parameters of this run's config"
        raise UserError(Problem("the optimizer state on disk is of another model", saw, want, "the checkpoint"))
    held: dict[str, list[tuple[int, ParameterSlice]]] = defaultdict(list)
    for old_rank in range(old.world_size):
        for piece in old.parameter_slices(old_rank):
            held[piece.name].append((old_rank, piece))
    copies: list[list[SliceCopy]] = [[] for _ in new.tensors]
    for goal in new.parameter_slices(rank):
        for old_rank, piece in held[goal.name]:
            first = max(goal.first, piece.first)
            stop = min(goal.stop, piece.stop)
            if first < stop:
                start = piece.offset + first - piece.first
                offset = goal.offset + first - goal.first
                copies[goal.tensor].append(SliceCopy(old_rank, piece.tensor, start, start + stop - first, offset))
    return copies


def source_ranks(old: ShardLayout, new: ShardLayout, rank: int) -> list[int]:
    """The ranks of the old world whose shards this rank of the new one must read; at least one, for the counters."""
    return sorted({copy.rank for copies in plan_slice_copies(old, new, rank) for copy in copies}) or [0]


def reshard_optimizer_state(
    template: Mapping[str, Any], shards: Mapping[int, Mapping[str, Any]], old: ShardLayout, new: ShardLayout, rank: int
) -> dict[str, Any]:
    """This rank's optimizer state, from the shards of `source_ranks`. New tensors, the old ones are not kept.

    `template` is the rank's own state of the moment: its form and hyperparameters stay, its numbers are
    replaced. Counters and the loss scale are the same on every rank and are taken from one of them; a loss
    scale of another precision means nothing here. Errors: UserError where the optimizer state is not
    partitioned as expected.
    """
    some_shard = next(iter(shards.values()))
    old_masters, old_optimizer = find_state_keys(some_shard)
    new_masters, new_optimizer = find_state_keys(template)
    for shard in shards.values():
        _check_state_sizes(shard[old_optimizer], old)
    copies = plan_slice_copies(old, new, rank)
    tensors = range(len(new.tensors))

    masters = {(r, k): flat for r, shard in shards.items() for k, flat in enumerate(shard[old_masters])}
    state: dict[str, Any] = dict(template)
    state[new_masters] = [_copy_slices(masters, copies[tensor], new.shard_size(tensor)) for tensor in tensors]

    old_states = {r: shard[old_optimizer]["state"] for r, shard in shards.items()}
    numbers: dict[int, dict[str, torch.Tensor]] = {}
    for tensor in tensors:
        sources = _source_tensors(old, new, tensor)
        # Before the first update there is no state at all.
        for name, value in old_states[next(iter(shards))].get(sources[0], {}).items():
            number = value.clone()  # a counter, of which each tensor has its own: it is counted up in place
            if is_elementwise_state(value):
                flats = {(r, k): states[k][name] for r, states in old_states.items() for k in sources}
                number = _copy_slices(flats, copies[tensor], new.shard_size(tensor))
            numbers.setdefault(tensor, {})[name] = number
    state[new_optimizer] = template[new_optimizer] | {"state": numbers}

    if type(some_shard.get(LOSS_SCALER_KEY)) is type(template.get(LOSS_SCALER_KEY)):
        state[LOSS_SCALER_KEY] = some_shard.get(LOSS_SCALER_KEY)
    return state


def _source_tensors(old: ShardLayout, new: ShardLayout, tensor: int) -> list[int]:
    """The flat tensors of the old layout that hold the parameters of one of the new. Their states have the same names.

    An optimizer may keep another state for some of its parameter groups, and no flat tensor is of two groups.
    """
    names = new.parameter_names(tensor)
    return [k for k in range(len(old.tensors)) if names & old.parameter_names(k)]


def _copy_slices(flats: Mapping[tuple[int, int], torch.Tensor], copies: list[SliceCopy], size: int) -> torch.Tensor:
    """A flat tensor of `size` elements out of slices of the old ones, which are known by (rank, tensor)."""
    flat = next(iter(flats.values())).new_zeros(size)
    for copy in copies:
        numbers = flats[copy.rank, copy.tensor][copy.start : copy.stop]
        flat[copy.offset : copy.offset + len(numbers)] = numbers
    return flat


def find_state_keys(state: Mapping[str, Any]) -> tuple[str, str]:
    """What this ZeRO stage calls the masters and the optimizer's own state; the first names, if it has neither."""
    masters = next((key for key in MASTER_KEYS if key in state), MASTER_KEYS[0])
    optimizer = next((key for key in OPTIMIZER_KEYS if key in state), OPTIMIZER_KEYS[0])
    return masters, optimizer


def _check_state_sizes(optimizer: Any, layout: ShardLayout) -> None:
    """Each tensor of the state is as long as the layout says; masters are, but for padding that DeepSpeed leaves away.

    Errors: UserError.
    """
    wrong: list[str] = []
    if isinstance(optimizer, dict):
        for tensor, state in optimizer["state"].items():
            size = layout.shard_size(tensor)
            for name, value in state.items():
                if is_elementwise_state(value) and value.numel() != size:
                    wrong.append(f"{value.numel()} elements of {name}, not {size}")
    else:
        wrong.append("a list of states")  # with elastic_checkpoint
    if wrong:
        what = "the optimizer state is not partitioned as expected"
        want = "flat tensors split evenly over all ranks"
        change = "zero_optimization in engine.ds_config and the number of ranks, back to what wrote the checkpoint"
        raise UserError(Problem(what, saw=wrong[0], want=want, change=change))
