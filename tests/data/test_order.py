"""Orders, mixes and digests: pure functions of integers, and pinned, for a run must go on in the order it began in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.data import order

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6).map(tuple)


# --- shuffles ---


@settings(deadline=None)
@given(st.integers(0, 2**70), st.integers(0, 5), st.integers(1, 300), st.sampled_from([0, order.SORTED]))
def test_a_shuffle_is_a_permutation(seed: int, epoch: int, num: int, most: int):
    before, order.SORTED = order.SORTED, most  # both ways to make one
    try:
        assert sorted(order.shuffled(np.arange(num), num, seed, epoch).tolist()) == list(range(num))
    finally:
        order.SORTED = before


def test_a_large_shuffle_is_a_permutation_too():
    num = 3 * order.SORTED
    assert (np.sort(order.shuffled(np.arange(num), num, 1)) == np.arange(num)).all()


def test_any_part_of_a_shuffle_is_that_of_the_whole():
    num = 10 * order.SORTED
    places = np.array([[5, num - 1], [0, 5]])
    assert (order.shuffled(places, num, 3) == order.shuffled(np.arange(num), num, 3)[places]).all()


def test_orders_are_pinned():
    """A new version of numpy or of this file must not reorder the runs of old ones."""
    assert order.shuffled(np.arange(8), 8, 1234, 0).tolist() == [6, 4, 5, 3, 7, 2, 1, 0]
    assert order.shuffled(np.arange(4), 10**6, 1234, 0).tolist() == [685527, 602041, 728678, 206477]
    assert order.stream_of(np.arange(12), 4).tolist() == STREAMS


def test_keys_make_other_orders():
    keys = [(seed, epoch) for seed in (0, 1, 2**32) for epoch in range(3)]
    for num in (20, 2 * order.SORTED):
        assert len({tuple(order.shuffled(np.arange(20), num, *key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("num", [6, 2 * order.SORTED])
def test_every_place_is_as_likely_as_any_other(num: int):
    """Chi-square over where two places go: 5.2 standard deviations are one failure in 10 million (and it is pinned)."""
    sent = np.array([order.shuffled(np.array([0, num // 2]), num, seed) for seed in range(3000)])
    for values in (sent[:, 0], sent[:, 1], (sent[:, 1] - sent[:, 0]) % num):
        bins = min(num, 20)
        counts = np.bincount(values * bins // num, minlength=bins)
        if (values != 0).all():  # a difference is never 0
            counts, bins = (counts[1:], bins - 1) if num == 6 else (counts, bins)
        expected = 3000 / bins
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < bins - 1 + 5.2 * (2 * (bins - 1)) ** 0.5


# --- streams ---


@given(st.integers(1, 2000), st.integers(1, 200))
def test_the_number_of_streams_fits_steps_and_ranks(rows_per_rank: int, world_size: int):
    rows = rows_per_rank * world_size
    num = order.num_streams(rows, world_size)
    assert rows % num == num % world_size == 0
    assert num <= max(order.MAX_STREAMS, world_size)


def test_the_number_of_streams_is_the_largest_that_fits():
    pairs = [(16, 2), (512, 8), (100, 1), (96, 3), (1024, 128), (12, 1)]
    assert [order.num_streams(*pair) for pair in pairs] == [16, 64, 50, 48, 128, 12]


@given(st.integers(1, 40), st.integers(0, 10**12))
def test_each_stream_has_one_position_among_as_many(num_streams: int, block: int):
    positions = block * num_streams + np.arange(num_streams)
    assert sorted(order.stream_of(positions, num_streams)) == list(range(num_streams))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.7, 0.2, 0.1)])
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_every_stream_meets_every_source_in_its_share(weights: tuple[float, ...], num_streams: int):
    """In a regular order two sources in turn would go to the even streams and to the odd ones."""
    positions = np.arange(1000 * num_streams)
    sources = order.mix_pattern(weights)[positions % order.MIX_WINDOW]
    for stream in range(num_streams):
        found = np.bincount(sources[order.stream_of(positions, num_streams) == stream], minlength=len(weights))
        assert np.abs(found / 1000 - np.array(weights) / sum(weights)).max() < 0.05


# --- mixes ---


@given(WEIGHTS, st.integers(0, 5000))
def test_any_window_holds_exactly_the_same_shares(weights: tuple[float, ...], begin: int):
    positions = begin + np.arange(order.MIX_WINDOW)
    found = np.bincount(order.mix_pattern(weights)[positions % order.MIX_WINDOW], minlength=len(weights))
    assert found.tolist() == order.shares(order.MIX_WINDOW, weights)


@given(WEIGHTS)
def test_shares_are_the_weights_to_one_row(weights: tuple[float, ...]):
    counts = np.array(order.shares(order.MIX_WINDOW, weights))
    exact = np.array(weights) / sum(weights) * order.MIX_WINDOW
    assert counts.sum() == order.MIX_WINDOW
    assert counts.min() >= 1
    assert (np.abs(counts - exact) <= len(weights)).all()
    assert (np.abs(counts - exact) < 1).all() or exact.min() < 1  # else only those that lent a row to a tiny one


def test_a_source_of_no_weight_has_no_row():
    assert order.shares(1000, (1.0, 0.0, 3.0)) == [250, 0, 750]
    assert 1 not in order.mix_pattern((1.0, 0.0, 3.0))


def test_a_mix_is_spread_evenly_and_pinned():
    assert order.mix_pattern((0.7, 0.3))[:10].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    counts = np.cumsum(order.mix_pattern((0.7, 0.3)))
    assert np.abs(counts - 0.3 * np.arange(1, 1001)).max() < 1.5


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_running_count(values: list[int]):
    found = order.running_count(np.array(values, np.int64)).tolist()
    assert found == [values[:i].count(value) for i, value in enumerate(values)]


@given(st.integers(1, 40), st.integers(1, 40))
def test_spread_is_distinct_even_and_within(num: int, num_rows: int):
    rows = order.spread(num, num_rows)
    assert len(rows) == min(num, num_rows)
    assert rows[0] == 0
    gaps = np.diff([*rows, num_rows])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


# --- the ledger ---


def test_a_row_digest_sees_position_row_and_tokens():
    ids = np.array([[1, 2, 3]], np.uint16)
    zero, one = np.array([0]), np.array([1])
    digests = [
        *order.row_digests(zero, zero, ids),
        *order.row_digests(one, zero, ids),
        *order.row_digests(zero, one, ids),
        *order.row_digests(zero, zero, ids + np.uint16(1)),
        *order.row_digests(zero, zero, ids[:, ::-1].copy()),
    ]
    assert len(set(digests)) == 5
    assert all(0 <= digest < 2**64 for digest in digests)


def test_digests_are_pinned():
    assert order.row_digests(np.array([7]), np.array([11]), np.arange(5, dtype=np.uint16)[None]) == [PINNED]


def test_a_ledger_is_a_chain():
    one = order.extend(order.NO_STEPS, 5)
    assert order.extend(one, 6) != order.extend(order.extend(order.NO_STEPS, 6), 5)
    assert order.extend(order.NO_STEPS, 5 + 2**64) == one
    assert len(one) == 32


STREAMS = [0, 1, 2, 3, 1, 2, 3, 0, 2, 3, 0, 1]
PINNED = 13420281541614608937
