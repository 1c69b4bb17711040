"""Orders, mixes and digests: pure functions of integers, and pinned, for a run must go on in the order it began in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.data import order
from smoltrain.data.order import (
    EMPTY_LEDGER,
    MAX_SORTED,
    MAX_STREAMS,
    MIX_WINDOW,
    apportion_by_weight,
    count_earlier_equals,
    evenly_spaced_rows,
    extend_ledger,
    hash_rows,
    largest_num_streams,
    mix_pattern,
    permute_places,
    streams_of_positions,
)

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6).map(tuple)


# --- shuffles ---


@given(st.integers(0, 2**70), st.integers(0, 5), st.integers(1, 300), st.sampled_from([0, MAX_SORTED]))
def test_a_shuffle_is_a_permutation(seed: int, epoch: int, num: int, most: int):
    before, order.MAX_SORTED = order.MAX_SORTED, most  # both ways to make one
    try:
        assert sorted(permute_places(np.arange(num), num, seed, epoch).tolist()) == list(range(num))
    finally:
        order.MAX_SORTED = before


def test_a_large_shuffle_is_a_permutation_too():
    num = 3 * MAX_SORTED
    assert (np.sort(permute_places(np.arange(num), num, 1)) == np.arange(num)).all()


def test_any_part_of_a_shuffle_is_that_of_the_whole():
    num = 10 * MAX_SORTED
    places = np.array([[5, num - 1], [0, 5]])
    assert (permute_places(places, num, 3) == permute_places(np.arange(num), num, 3)[places]).all()


def test_orders_are_pinned():
    """A new version of numpy or of this file must not reorder the runs of old ones."""
    assert permute_places(np.arange(8), 8, 1234, 0).tolist() == [6, 4, 5, 3, 7, 2, 1, 0]
    assert permute_places(np.arange(4), 10**6, 1234, 0).tolist() == [685527, 602041, 728678, 206477]
    assert streams_of_positions(np.arange(12), 4).tolist() == STREAMS


def test_keys_make_other_orders():
    keys = [(seed, epoch) for seed in (0, 1, 2**32) for epoch in range(3)]
    for num in (20, 2 * MAX_SORTED):
        assert len({tuple(permute_places(np.arange(20), num, *key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("num", [6, 2 * MAX_SORTED])
def test_every_place_is_as_likely_as_any_other(num: int):
    """Chi-square over where two places go: 5.2 standard deviations are one failure in 10 million (and it is pinned)."""
    sent = np.array([permute_places(np.array([0, num // 2]), num, seed) for seed in range(3000)])
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
    num = largest_num_streams(rows, world_size)
    assert rows % num == num % world_size == 0
    assert num <= max(MAX_STREAMS, world_size)


def test_the_number_of_streams_is_the_largest_that_fits():
    pairs = [(16, 2), (512, 8), (100, 1), (96, 3), (1024, 128), (12, 1)]
    assert [largest_num_streams(*pair) for pair in pairs] == [16, 64, 50, 48, 128, 12]


@given(st.integers(1, 40), st.integers(0, 10**12))
def test_each_stream_has_one_position_among_as_many(num_streams: int, block: int):
    positions = block * num_streams + np.arange(num_streams)
    assert sorted(streams_of_positions(positions, num_streams)) == list(range(num_streams))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.7, 0.2, 0.1)])
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_every_stream_meets_every_source_in_its_share(weights: tuple[float, ...], num_streams: int):
    """In a regular order two sources in turn would go to the even streams and to the odd ones."""
    positions = np.arange(1000 * num_streams)
    sources = mix_pattern(weights)[positions % MIX_WINDOW]
    for stream in range(num_streams):
        found = np.bincount(sources[streams_of_positions(positions, num_streams) == stream], minlength=len(weights))
        assert np.abs(found / 1000 - np.array(weights) / sum(weights)).max() < 0.05


# --- mixes ---


@given(WEIGHTS, st.integers(0, 5000))
def test_any_window_holds_exactly_the_same_shares(weights: tuple[float, ...], begin: int):
    positions = begin + np.arange(MIX_WINDOW)
    found = np.bincount(mix_pattern(weights)[positions % MIX_WINDOW], minlength=len(weights))
    assert found.tolist() == apportion_by_weight(MIX_WINDOW, weights)


@given(WEIGHTS)
def test_shares_are_the_weights_to_one_row(weights: tuple[float, ...]):
    counts = np.array(apportion_by_weight(MIX_WINDOW, weights))
    exact = np.array(weights) / sum(weights) * MIX_WINDOW
    assert counts.sum() == MIX_WINDOW
    assert counts.min() >= 1
    assert (np.abs(counts - exact) <= len(weights)).all()
    assert (np.abs(counts - exact) < 1).all() or exact.min() < 1  # else only those that lent a row to a tiny one


def test_a_source_of_no_weight_has_no_row():
    assert apportion_by_weight(1000, (1.0, 0.0, 3.0)) == [250, 0, 750]
    assert 1 not in mix_pattern((1.0, 0.0, 3.0))


def test_a_mix_is_spread_evenly_and_pinned():
    assert mix_pattern((0.7, 0.3))[:10].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    counts = np.cumsum(mix_pattern((0.7, 0.3)))
    assert np.abs(counts - 0.3 * np.arange(1, 1001)).max() < 1.5


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_running_count(values: list[int]):
    found = count_earlier_equals(np.array(values, np.int64)).tolist()
    assert found == [values[:i].count(value) for i, value in enumerate(values)]


@given(st.integers(1, 40), st.integers(1, 40))
def test_spread_is_distinct_even_and_within(num: int, num_rows: int):
    rows = evenly_spaced_rows(num, num_rows)
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
        *hash_rows(zero, zero, ids),
        *hash_rows(one, zero, ids),
        *hash_rows(zero, one, ids),
        *hash_rows(zero, zero, ids + np.uint16(1)),
        *hash_rows(zero, zero, ids[:, ::-1].copy()),
    ]
    assert len(set(digests)) == 5
    assert all(0 <= digest < 2**64 for digest in digests)


def test_digests_are_pinned():
    assert hash_rows(np.array([7]), np.array([11]), np.arange(5, dtype=np.uint16)[None]) == [PINNED]


def test_a_ledger_is_a_chain():
    one = extend_ledger(EMPTY_LEDGER, 5)
    assert extend_ledger(one, 6) != extend_ledger(extend_ledger(EMPTY_LEDGER, 6), 5)
    assert extend_ledger(EMPTY_LEDGER, 5 + 2**64) == one
    assert len(one) == 32


STREAMS = [0, 1, 2, 3, 1, 2, 3, 0, 2, 3, 0, 1]
PINNED = 13420281541614608937
