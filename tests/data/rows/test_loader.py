"""The global sequence does not know the world size: not after kills, not across epochs, not in its ledger."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.data.order import evenly_spaced_rows, permute_places
from smoltrain.errors import UserError
from tests.data.worlds import SEED, WORLDS, B, T, World, cached

SHAPES = [(world, size) for world in (*WORLDS, 12) for size in (1, 2, 3, 4, 6, 12) if B // world % size == 0]
LIVES = st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(0, 5)), min_size=1, max_size=5)


def starts(rows: list[list[int]]) -> list[int]:
    """Which rows these are, of a source whose tokens are their own places."""
    assert all(row == list(range(row[0], row[0] + T + 1)) for row in rows)
    return sorted((row[0] - 1) // T for row in rows)


def by_definition(num_steps: int, num_rows: int) -> list[list[int]]:
    """The rows of each step of a single source: position p is place p mod N of a shuffle of epoch p div N."""
    rows = []
    for p in range(num_steps * B):
        epoch, place = divmod(p, num_rows)
        rows.append(int(permute_places(np.array([place]), num_rows, SEED, 0, epoch)[0]))
    return [sorted(rows[i * B : (i + 1) * B]) for i in range(num_steps)]


# --- one sequence ---


@pytest.mark.parametrize(("world", "micro_batch"), SHAPES)
def test_the_sequence_is_its_definition_on_any_world(world: int, micro_batch: int):
    reference, ranks = World(cached(31), 1), World(cached(31), world, micro_batch=micro_batch)
    for expected in by_definition(8, 31):
        assert starts(ranks.rows()) == expected
        assert (ranks.step() == reference.step()).all()
    assert ranks.ledger == reference.ledger


def test_eight_ranks_take_over_from_one_and_hand_over_to_three():
    reference = World(cached(31, 7), 1, rows_per_step=24)
    state = ""
    for world in (1, 8, 3, 8, 2):
        ranks = World(cached(31, 7), world, rows_per_step=24)
        if state:
            ranks.load(state)
        assert (ranks.steps(3) == reference.steps(3)).all()
        state = ranks.state()
        ranks.rows()
    assert json.loads(state) == json.loads(reference.state())


@settings(max_examples=25)
@given(LIVES, st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_kills_and_other_worlds_neither_repeat_nor_skip(lives: list[tuple[int, int]], sources: list[int]):
    """Each life runs some steps on its world, takes one more step's rows and is killed before it has used them."""
    prepared = cached(*sources)
    weights = {f"s{i}": i + 0.5 for i in range(len(sources))}
    reference = World(prepared, 1, weights=weights)
    expected = reference.steps(sum(num for _, num in lives))
    state, seen = "", []
    for world, num_steps in lives:
        ranks = World(prepared, world, weights=weights)
        if state:
            ranks.load(state)
        seen.append(ranks.steps(num_steps))
        state = ranks.state()
        ranks.rows()
    assert (np.concatenate(seen) == expected).all()
    assert json.loads(state) == json.loads(reference.state())


def test_take_again_gives_the_same_rows_until_they_are_consumed():
    world = World(cached(31), 1)
    (loader,) = world.ranks
    first, again = loader.fetch_step_rows(), loader.fetch_step_rows()
    assert first.counts == again.counts
    assert loader.rows_consumed == 0
    assert all(a.ids_BT.equal(b.ids_BT) for a, b in zip(first.micro_batches, again.micro_batches, strict=True))
    world.step()
    assert loader.fetch_step_rows().counts != first.counts
    assert loader.rows_consumed == B


def test_consumed_twice_is_a_mistake():
    (loader,) = World(cached(31), 1).ranks
    totals = loader.unpack_totals(loader.fetch_step_rows().counts)
    loader.mark_consumed(totals)
    with pytest.raises(AssertionError, match="a step would be skipped"):
        loader.mark_consumed(totals)


def test_the_rows_of_a_step_must_come_out():
    with pytest.raises(AssertionError):
        World(cached(31), 5)


def test_shapes_labels_and_counts():
    ranks = World(cached(31), 3, micro_batch=2).ranks
    rows = ranks[1].fetch_step_rows()
    assert len(rows.micro_batches) == 2
    assert rows.counts[0] == 2 * 2 * T
    assert ranks[1].unpack_totals(rows.counts).num_targets == 2 * 2 * T
    for batch in rows.micro_batches:
        assert batch.ids_BT.shape == batch.labels_BT.shape == (2, T)
        assert batch.ids_BT.dtype == batch.labels_BT.dtype == torch.int64
        assert batch.labels_BT.equal(batch.ids_BT + 1)
        assert batch.positions_BT is None


# --- mixes ---


def test_sources_share_the_rows_by_weight_and_the_mix_may_change():
    ranks = World(cached(200, 5, 9), 2, weights={"s0": 5.0, "s1": 3.0, "s2": 2.0})
    (loader, _) = ranks.ranks
    ranks.steps(1000 // B + 1)
    assert loader.source_rows.tolist() == [504, 302, 202]  # of 84 steps
    assert loader.source_targets == [2016, 1208, 808]
    before = loader.source_rows.copy()
    ranks.steps(250, {"s0": 1.0, "s2": 3.0})
    assert (loader.source_rows - before).tolist() == [750, 0, 2250]
    assert np.abs(loader.source_rows.sum() - loader.rows_consumed) == 0


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(0, 4), st.sampled_from([None, "a", "b"])), min_size=1))
def test_a_change_of_mix_survives_kills_and_other_worlds(lives: list[tuple[int, int, str | None]]):
    mixes = {None: None, "a": {"s0": 1.0, "s1": 2.0}, "b": {"s1": 1.0}}
    reference, state = World(cached(31, 17), 1), ""
    for world, num_steps, mix in lives:
        ranks = World(cached(31, 17), world)
        if state:
            ranks.load(state)
        assert (ranks.steps(num_steps, mixes[mix]) == reference.steps(num_steps, mixes[mix])).all()
        state = ranks.state()


# --- counters ---


def test_counters_of_rows_and_documents():
    """24 rows of 4 targets are 97 tokens; documents of 6 tokens begin in 16 or 17 of them."""
    ranks = World(cached(24), 2)
    (loader, _) = ranks.ranks
    assert (loader.epochs, loader.repeat_factor, loader.unique_rows) == (0, 0, 0)
    ranks.steps(1)
    assert (loader.epochs, loader.repeat_factor, loader.unique_rows) == (0.5, 1, 12)
    ranks.steps(1)
    assert (loader.unique_rows, loader.unique_documents, loader.targets_consumed) == (24, 16, 96)
    ranks.steps(2)
    assert (loader.epochs, loader.repeat_factor) == (2, 2)
    assert (loader.unique_rows, loader.unique_documents, loader.targets_consumed) == (24, 16, 192)


# --- other sequences ---


def test_the_ledger_tells_other_data_and_other_seeds_apart():
    ledgers = set()
    for num_rows, seed in ((31, SEED), (31, 8), (200, SEED)):
        ranks = World(cached(num_rows), 2, seed=seed)
        ranks.step()
        ledgers.add(ranks.ledger)
    assert len(ledgers) == 3


@pytest.mark.parametrize(
    ("num_rows", "changes", "key", "saw", "want"),
    [
        (31, {"seed": 8}, "seed", "8", "7"),
        (32, {}, "num_rows", "[32]", "[31]"),
        (31, {"rows_per_step": 24}, "rows_per_step", "24", "12"),
        (31, {"streams": 3}, "streams", "3", "1"),
    ],
)
def test_a_state_of_another_sequence_is_refused(num_rows: int, changes: dict[str, Any], key: str, saw: str, want: str):
    state = World(cached(31), 1).state()
    with pytest.raises(UserError) as caught:
        World(cached(num_rows), 1, **changes).load(state)
    (problem,) = caught.value.problems
    assert problem.what.endswith(key)
    assert (problem.saw, problem.want) == (saw, want)


def test_a_state_of_another_format_is_refused():
    world = World(cached(31), 1)
    state = json.loads(world.state()) | {"format": 1}
    with pytest.raises(UserError, match="format: saw 3, want 1"):
        world.load(json.dumps(state))


def test_a_state_of_the_format_before_is_loaded():
    """It also has the sketch of a metric that is no longer logged."""
    before, world = World(cached(31), 2), World(cached(31), 3)
    before.steps(4)
    state = json.loads(before.state())
    assert state["format"] == 3
    world.load(json.dumps(state | {"format": 2, "sketch": "eNpjYBgFo2AUDHcAAEAAAAE="}))
    assert (world.steps(3) == before.steps(3)).all()
    assert json.loads(world.state()) == json.loads(before.state())


# --- document mask ---


def masked(ids: list[int], world: int = 1) -> Any:
    """The only batch over a stream of ids, with a document mask."""
    prepared = cached(31)
    tokens = prepared.train[0]
    tokens._parts[0] = np.array(ids * 40, np.uint16)[: len(tokens)]
    ranks = World(prepared, world, micro_batch=B // world, document_mask=True)
    return [loader.fetch_step_rows().micro_batches[0] for loader in ranks.ranks]


def test_positions_restart_and_the_first_label_of_a_document_is_none():
    (batch,) = masked([9, 8, 0, 7, 0, 5, 4, 3, 2, 0])  # 0 is the separator
    assert batch.positions_BT is not None
    tensors = (batch.ids_BT, batch.labels_BT, batch.positions_BT)
    for ids, labels, positions in zip(*(tensor.tolist() for tensor in tensors), strict=True):
        place = 0
        for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
            assert positions[i] == place
            place = 0 if token == 0 else place + 1
            assert (label == -100) == (token == 0)
            if i + 1 < T and token != 0:
                assert label == ids[i + 1]


# --- validation ---


def valid_rows(batches: list[Any]) -> list[int]:
    return [
        (int(ids[0]) - 30_000) // T
        for batch in batches
        for ids, labels in zip(batch.ids_BT, batch.labels_BT, strict=True)
        if (labels != -100).all()
    ]


@given(st.sampled_from(SHAPES), st.integers(1, 30))
def test_validation_is_the_same_rows_on_any_world_in_equal_numbers_of_batches(shape: tuple[int, int], rows: int):
    world, micro_batch = shape
    dealt = [loader.validation_batches(rows) for loader in World(cached(31), world, micro_batch=micro_batch).ranks]
    assert sorted(row for batches in dealt for row in valid_rows(batches)) == evenly_spaced_rows(rows, 17)
    assert len({len(batches) for batches in dealt}) == 1
    for batch in (batch for batches in dealt for batch in batches):
        assert batch.ids_BT.shape == (micro_batch, T)
        assert ((batch.labels_BT == -100).all(1) | (batch.labels_BT == batch.ids_BT + 1).all(1)).all()


def test_the_rows_that_are_evaluated_are_counted_before():
    (loader,) = World(cached(31, 31), 1, weights={"s0": 3.0, "s1": 1.0}).ranks
    for asked in (1, 2, 8, 30, 1000):
        assert loader.count_validation_rows(asked) == len(valid_rows(loader.validation_batches(asked)))
    assert loader.count_validation_rows(1000) == 2 * 17, "all that there are"


def test_sources_share_the_validation_rows_by_weight():
    (loader,) = World(cached(31, 31), 1, weights={"s0": 3.0, "s1": 1.0}).ranks
    rows = valid_rows(loader.validation_batches(8))
    assert (sum(row < 200 for row in rows), sum(row >= 200 for row in rows)) == (6, 2)


def test_validation_does_not_move_the_training():
    world = World(cached(31), 2)
    before = world.state()
    for loader in world.ranks:
        loader.validation_batches(5)
    assert world.state() == before
