"""The global sequence does not know the world size: not after kills, not across epochs, not in its ledger."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.data import Loader, Prepared, order
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.errors import UserError

B, T, SEED = 12, 4, 7
WORLDS = (1, 2, 3, 4, 6)
SHAPES = [(world, size) for world in WORLDS for size in (1, 2, 3, 4, 6, 12) if B // world % size == 0]
TOKENIZER = Tokenizer.train_bpe(["x"], 257, "<|endoftext|>")


def tokens(num_rows: int) -> np.ndarray:
    """A stream whose tokens are their own places, so that a row says which one it is."""
    return np.arange(num_rows * T + 1, dtype=np.uint16)


def loaders(world: int, num_rows: int = 31, micro_batch: int = 1, **changes: Any) -> list[Loader]:
    settings_: dict[str, Any] = {"sequence_length": T, "rows_per_step": B, "seed": SEED} | changes
    prepared = Prepared(TOKENIZER, tokens(num_rows), tokens(17), {}, "bpe")
    accumulation = settings_["rows_per_step"] // world // micro_batch
    same = {"micro_batch": micro_batch, "accumulation": accumulation, "world_size": world, **settings_}
    return [Loader(prepared, rank=rank, **same) for rank in range(world)]


def step(ranks: list[Loader]) -> list[int]:
    """One step on all ranks; the rows (by number) in the order of their positions."""
    taken = [loader.take() for loader in ranks]
    total = torch.tensor([rows.digest for rows in taken]).sum().item()  # wraps, as the all-reduce does
    for loader in ranks:
        loader.consumed(int(total))
    micro_batches = [batch for index in zip(*(rows.micro_batches for rows in taken), strict=True) for batch in index]
    return [int(ids[0]) // T for batch in micro_batches for ids in batch.ids_BT]


def reference(num_steps: int, num_rows: int = 31) -> tuple[list[int], str]:
    """The sequence by its definition, and the ledger of one rank."""
    ranks = loaders(1, num_rows)
    seen = [row for _ in range(num_steps) for row in step(ranks)]
    assert seen == [order.row_at(position, SEED, num_rows) for position in range(num_steps * B)]
    return seen, ranks[0].ledger


# --- order ---


@given(st.integers(0, 2**70), st.integers(0, 5), st.integers(1, 50))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, num_rows: int):
    assert sorted(order.permutation(seed, epoch, num_rows)) == list(range(num_rows))


def test_epochs_and_seeds_differ_and_the_order_is_pinned():
    orders = {tuple(order.permutation(seed, epoch, 20)) for seed in (0, 1, 2**32) for epoch in range(3)}
    assert len(orders) == 9
    assert order.permutation(1234, 0, 8).tolist() == [6, 1, 0, 4, 5, 7, 2, 3]  # a new numpy must not reorder old runs


@given(st.sampled_from(SHAPES), st.integers(0, 100))
def test_the_ranks_of_a_step_share_its_positions_out(shape: tuple[int, int], step_number: int):
    world, micro_batch = shape
    start, accumulation = step_number * B, B // world // micro_batch
    dealt = [
        position
        for index in range(accumulation)
        for rank in range(world)
        for position in order.positions(start, index, micro_batch, rank, world)
    ]
    assert dealt == list(range(start, start + B))


@given(st.integers(1, 40), st.integers(1, 40))
def test_spread_is_distinct_even_and_within(num: int, num_rows: int):
    rows = order.spread(num, num_rows)
    assert len(rows) == min(num, num_rows)
    assert rows[0] == 0
    gaps = np.diff([*rows, num_rows])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
def test_digests_sum_modulo_2_to_the_64_as_int64_does(digests: list[int]):
    total = torch.tensor([order.signed(digest) for digest in digests]).sum().item()
    assert total == order.signed(sum(digests) % order.WORD)
    assert order.extend(order.NO_STEPS, int(total)) == order.extend(order.NO_STEPS, sum(digests))


def test_a_row_digest_sees_position_row_and_tokens_but_not_their_dtype():
    ids = np.array([1, 2, 3], np.uint16)
    others = [(1, 0, ids), (0, 1, ids), (0, 0, ids + 1), (0, 0, ids[::-1])]
    assert len({order.row_digest(0, 0, ids), *(order.row_digest(*other) for other in others)}) == 5
    assert order.row_digest(0, 0, ids) == order.row_digest(0, 0, ids.astype(np.uint32))


# --- loader ---


@pytest.mark.parametrize(("world", "micro_batch"), SHAPES)
def test_sequence_and_ledger_are_those_of_one_rank(world: int, micro_batch: int):
    seen, ledger = reference(8)
    ranks = loaders(world, micro_batch=micro_batch)
    assert [row for _ in range(8) for row in step(ranks)] == seen
    assert {loader.ledger for loader in ranks} == {ledger}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(0, 5)), min_size=1, max_size=5), st.integers(B, 40))
def test_kills_and_other_worlds_neither_repeat_nor_skip(lives: list[tuple[int, int]], num_rows: int):
    """Each life runs some steps on its world, takes one more step's rows and is killed before it has used them."""
    state, seen = None, []
    for world, num_steps in lives:
        ranks = loaders(world, num_rows)
        if state is not None:
            for loader in ranks:
                loader.load_state(json.loads(state))
        for _ in range(num_steps):
            seen += step(ranks)
        (state,) = {json.dumps(loader.state()) for loader in ranks}
        for loader in ranks:
            loader.take()
    expected, ledger = reference(sum(num_steps for _, num_steps in lives), num_rows)
    assert seen == expected
    assert json.loads(state or "{}")["ledger"] == ledger
    for start in range(0, len(seen) - num_rows + 1, num_rows):
        assert sorted(seen[start : start + num_rows]) == list(range(num_rows))


def test_take_again_gives_the_same_rows_until_they_are_consumed():
    (loader,) = loaders(1)
    first, again = loader.take(), loader.take()
    assert first.digest == again.digest
    assert loader.rows_consumed == 0
    assert all(a.ids_BT.equal(b.ids_BT) for a, b in zip(first.micro_batches, again.micro_batches, strict=True))
    loader.consumed(first.digest)
    assert loader.take().digest != first.digest
    assert loader.rows_consumed == B


def test_consumed_twice_is_a_mistake():
    (loader,) = loaders(1)
    loader.consumed(loader.take().digest)
    with pytest.raises(AssertionError, match="a step would be skipped"):
        loader.consumed(0)


def test_shapes_labels_and_counts():
    loader = loaders(3, micro_batch=2)[1]
    rows = loader.take()
    assert len(rows.micro_batches) == 2
    assert rows.num_tokens == 2 * 2 * T
    assert -(2**63) <= rows.digest < 2**63
    for batch in rows.micro_batches:
        assert batch.ids_BT.shape == batch.labels_BT.shape == (2, T)
        assert batch.ids_BT.dtype == batch.labels_BT.dtype == torch.int64
        assert batch.labels_BT.equal(batch.ids_BT + 1)


def test_epoch_counts_with_its_fraction():
    ranks = loaders(1, num_rows=24)
    assert ranks[0].epoch == 0
    step(ranks)
    assert ranks[0].epoch == 0.5
    assert ranks[0].tokens_consumed == B * T
    assert ranks[0].num_rows == 24


def test_the_ledger_tells_other_data_and_other_seeds_apart():
    ledgers = set()
    for changes in ({}, {"seed": 8}, {"num_rows": 200}):
        ranks = loaders(2, **changes)
        step(ranks)
        ledgers.add(ranks[0].ledger)
    assert len(ledgers) == 3


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"seed": 8}, "seed"), ({"num_rows": 32}, "num_rows"), ({"rows_per_step": 24}, "rows_per_step")],
)
def test_a_state_of_another_sequence_is_refused(changes: dict[str, int], key: str):
    state = loaders(1)[0].state()
    with pytest.raises(UserError) as caught:
        loaders(1, **changes)[0].load_state(state)
    (problem,) = caught.value.problems
    assert problem.what.endswith(key)
    assert (problem.saw, problem.want) == (str(changes[key]), str(state[key]))


def test_a_state_of_another_format_is_refused():
    (loader,) = loaders(1)
    with pytest.raises(UserError, match="format: saw 1, want 2"):
        loader.load_state(loader.state() | {"format": 2})


def test_the_rows_of_a_step_must_come_out():
    with pytest.raises(AssertionError):
        loaders(5)


# --- validation ---


def valid_rows(batches: list[Any]) -> list[int]:
    return [
        int(ids[0]) // T
        for batch in batches
        for ids, labels in zip(batch.ids_BT, batch.labels_BT, strict=True)
        if (labels != -100).all()
    ]


@given(st.sampled_from(SHAPES), st.integers(1, 30))
@settings(deadline=None)
def test_validation_is_the_same_rows_on_any_world_in_equal_numbers_of_batches(shape: tuple[int, int], rows: int):
    world, micro_batch = shape
    dealt = [loader.validation(rows) for loader in loaders(world, micro_batch=micro_batch)]
    assert sorted(row for batches in dealt for row in valid_rows(batches)) == order.spread(rows, 17)
    assert len({len(batches) for batches in dealt}) == 1
    for batch in (batch for batches in dealt for batch in batches):
        assert batch.ids_BT.shape == (micro_batch, T)
        assert ((batch.labels_BT == -100).all(1) | (batch.labels_BT == batch.ids_BT + 1).all(1)).all()


def test_validation_does_not_move_the_training():
    ranks = loaders(2)
    before = [loader.state() for loader in ranks]
    for loader in ranks:
        loader.validation(5)
    assert [loader.state() for loader in ranks] == before
