"""Optimizer state that N ranks hold under one ZeRO stage, cut for M ranks under another: every number in its place."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.engine.reshard import (
    MASTER_KEYS,
    OPTIMIZER_KEYS,
    ShardLayout,
    build_shard_layout,
    reshard_optimizer_state,
    source_ranks,
)
from smoltrain.errors import UserError


def deal(segments: list[torch.Tensor], alignment: int, size: int) -> list[torch.Tensor]:
    """Every rank's part of a flat tensor, the plain way: pad each segment, split it, put the rank's pieces together."""
    padded = [torch.nn.functional.pad(x, (0, -len(x) % (alignment * size))) for x in segments]
    return [torch.cat([x.chunk(size)[rank] for x in padded]) for rank in range(size)]


def flat_tensors(
    groups: list[list[str]], values: dict[str, torch.Tensor], gaps: list[list[int]] | None
) -> list[list[torch.Tensor]]:
    """The segments of each flat tensor: with gaps one per group, as ZeRO-1 and ZeRO-2 do, else one per parameter."""
    if gaps is None:
        return [[values[name] for name in group] for group in groups]
    padded = [
        [torch.nn.functional.pad(values[name], (0, gap)) for name, gap in zip(group, some, strict=True)]
        for group, some in zip(groups, gaps, strict=True)
    ]
    return [[torch.cat(group)] for group in padded]


def states(dealt: list[list[torch.Tensor]], stage: int, lean: bool) -> list[dict[str, Any]]:
    """One optimizer state per rank in DeepSpeed's form, from each flat tensor's parts."""
    masters, adamw = (keys[stage == 3] for keys in (MASTER_KEYS, OPTIMIZER_KEYS))
    found = []
    for rank in range(len(dealt[0])):
        parts = [parts[rank] for parts in dealt]
        moments = {i: {"step": torch.tensor(7.0), "exp_avg": part * 2} for i, part in enumerate(parts)}
        last = [int(part.nonzero().max()) + 1 if part.any() else 0 for part in parts]  # no true element is 0
        held = [part[:end] if lean else part for part, end in zip(parts, last, strict=True)]
        own = {"state": moments, "param_groups": [f"of stage {stage}"]}
        found.append({masters: held, adamw: own, "loss_scaler": 2.0**stage, "form": stage})
    return found


@st.composite
def arrangements(draw: st.DrawFn, sizes: dict[str, int]) -> tuple[ShardLayout, list[dict[str, Any]], int]:
    """A way to hold these parameters (any stage, world, order, grouping, gaps), and what its ranks then hold."""
    stage, size = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    names = draw(st.permutations(list(sizes)))
    cuts = sorted(draw(st.sets(st.integers(1, len(names) - 1), max_size=2))) if len(names) > 1 else []
    groups = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    gaps = [[draw(st.integers(0, 7)) for _ in group] for group in groups] if draw(st.booleans()) else None
    values = {name: torch.arange(1.0, n + 1) + 100 * i for i, (name, n) in enumerate(sizes.items())}
    shapes = [{name: torch.Size([sizes[name]]) for name in group} for group in groups]
    filled = None if stage == 3 else gaps or [[0] * len(group) for group in groups]
    segments = flat_tensors(groups, values, filled)
    dealt = [deal(segment, 1 if stage == 3 else 2, size) for segment in segments]
    return build_shard_layout(stage, shapes, gaps, size), states(dealt, stage, draw(st.booleans())), stage


@given(data=st.data(), lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_any_world_and_stage_cut_anew_is_what_the_other_would_have_dealt(
    data: st.DataObject, lengths: list[int]
) -> None:
    sizes = {f"p{i}": n for i, n in enumerate(lengths)}
    old, wrote, _ = data.draw(arrangements(sizes))
    new, expected, stage = data.draw(arrangements(sizes))
    masters, adamw = (keys[stage == 3] for keys in (MASTER_KEYS, OPTIMIZER_KEYS))
    for rank, wanted in enumerate(expected):
        needed = {source: wrote[source] for source in source_ranks(old, new, rank)}
        found = reshard_optimizer_state(wanted, needed, old, new, rank)
        assert found.keys() == wanted.keys()
        assert (found["form"], found[adamw]["param_groups"]) == (stage, [f"of stage {stage}"])
        assert found["loss_scaler"] == wrote[0]["loss_scaler"]
        steps = [moments["step"] for moments in found[adamw]["state"].values()]
        assert len({step.data_ptr() for step in steps}) == len(steps), "AdamW counts each up in place"
        for i, moments in wanted[adamw]["state"].items():
            held = wanted[masters][i].tolist()
            assert found[masters][i].tolist()[: len(held)] == held
            assert not any(found[masters][i].tolist()[len(held) :])
            assert found[adamw]["state"][i]["exp_avg"].tolist() == moments["exp_avg"].tolist()
            assert found[adamw]["state"][i]["step"] == 7


def two_groups(size: int, stage: int = 2) -> ShardLayout:
    return build_shard_layout(stage, [{"a": torch.Size([800])}, {"b": torch.Size([80])}], None, size)


def test_a_rank_reads_no_more_shards_than_it_needs() -> None:
    assert [source_ranks(two_groups(8), two_groups(4), rank) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [source_ranks(two_groups(2), two_groups(4, 3), rank) for rank in range(4)] == [[0], [0], [1], [1]]
    one = [{"a": torch.Size([1])}]
    assert source_ranks(build_shard_layout(1, one, None, 2), build_shard_layout(1, one, None, 4), 3) == [0], (
        "all padding"
    )


def test_what_cannot_be_moved_is_refused_in_words() -> None:
    old, new = two_groups(2), two_groups(1)
    (other,) = states([deal([torch.arange(1.0, 12)], 4, 1)] * 2, 2, lean=False)
    with pytest.raises(UserError, match=r"not partitioned as expected: saw 12 elements of exp_avg, not 400"):
        reshard_optimizer_state(other, {0: other, 1: other}, old, new, 0)
    listed = other | {"base_optimizer_state": []}
    with pytest.raises(UserError, match="not partitioned as expected: saw a list"):
        reshard_optimizer_state(other, {0: listed, 1: listed}, old, new, 0)
    with pytest.raises(UserError, match="of another model: saw b differ"):
        source_ranks(old, build_shard_layout(2, [{"a": torch.Size([800])}, {"b": torch.Size([81])}], None, 1), 0)


def test_before_the_first_update_there_are_no_moments_and_a_foreign_loss_scale_is_left() -> None:
    layout = two_groups(1)
    (wrote,) = states([deal([torch.arange(1.0, n + 1)], 2, 1) for n in (800, 80)], 2, lean=False)
    wrote |= {"base_optimizer_state": {"state": {}}, "loss_scaler": "of another class"}
    (own,) = states([deal([torch.zeros(n)], 2, 1) for n in (800, 80)], 2, lean=False)
    found = reshard_optimizer_state(own, {0: wrote}, layout, layout, 0)
    assert found["base_optimizer_state"]["state"] == {}
    assert found["loss_scaler"] == 4.0
    assert [len(x) for x in found["single_partition_of_fp32_groups"]] == [800, 80]


@pytest.mark.parametrize(("old_stage", "new_stage"), [(2, 3), (3, 1)])
def test_a_group_keeps_the_state_of_its_own_names(old_stage: int, new_stage: int) -> None:
    """As of Muon: one tensor a weight in some groups, two and a counter in others."""
    matrix, vector = torch.arange(1.0, 12), torch.arange(20.0, 25)
    shapes = [{"a": torch.Size([11])}, {"b": torch.Size([5])}]

    def dealt(stage: int, size: int) -> list[dict[str, Any]]:
        found = states([deal([x], 1 if stage == 3 else 2, size) for x in (matrix, vector)], stage, lean=False)
        for state in found:
            moments = state[OPTIMIZER_KEYS[stage == 3]]["state"]
            moments[0] = {"momentum_buffer": moments[0]["exp_avg"]}
        return found

    old, new = (build_shard_layout(stage, shapes, None, size) for stage, size in ((old_stage, 3), (new_stage, 2)))
    wrote = dict(enumerate(dealt(old_stage, 3)))
    for rank, wanted in enumerate(dealt(new_stage, 2)):
        key = OPTIMIZER_KEYS[new_stage == 3]
        found = reshard_optimizer_state(wanted, wrote, old, new, rank)[key]["state"]
        assert {name: x.tolist() for name, x in found[0].items()} == {
            name: x.tolist() for name, x in wanted[key]["state"][0].items()
        }
        assert found[1].keys() == {"step", "exp_avg"}
        assert found[1]["exp_avg"].tolist() == wanted[key]["state"][1]["exp_avg"].tolist()
