"""The search finds what a search by hand finds: across cuts, under collisions, by several processes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.evaluation import ngram_search
from smoltrain.evaluation.ngram_search import BLOCK_TOKENS, find_ngrams

IDS = st.lists(st.integers(0, 2), max_size=60)  # few ids, so that much is found by chance


def find_by_hand(ngrams: np.ndarray, streams: list[list[int]]) -> list[bool]:
    """Each n-gram compared with each window of each stream."""
    known = {tuple(ids[i : i + ngrams.shape[1]]) for ids in streams for i in range(len(ids) - ngrams.shape[1] + 1)}
    return [tuple(ngram) in known for ngram in ngrams.tolist()]


def cut(ids: list[int], lengths: list[int]) -> list[np.ndarray]:
    """The ids as views of these lengths, in turn."""
    views = []
    start = 0
    while start < len(ids):
        length = lengths[len(views) % len(lengths)]
        views.append(np.array(ids[start : start + length], np.uint16))
        start += length
    return views


@given(
    streams=st.lists(IDS, max_size=3),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    num_parts=st.integers(1, 3),
    base=st.sampled_from((ngram_search.BASE, 1)),
    data=st.data(),
)
def test_it_finds_what_a_search_by_hand_finds(
    streams: list[list[int]], lengths: list[int], sizes: list[int], num_parts: int, base: int, data: st.DataObject
):
    asked = []
    for size in sizes:
        rows = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=size, max_size=size), max_size=12))
        asked.append(np.array(rows, np.int64).reshape(len(rows), size))
    with pytest.MonkeyPatch.context() as patch:
        if base == 1:  # then the hash is the sum of the ids, which many n-grams share
            patch.setattr(ngram_search, "_POWERS", np.ones(1000, np.uint64))
            patch.setattr(ngram_search, "_INVERSE_POWERS", np.ones(1000, np.uint64))
        parts = [
            find_ngrams(asked, [cut(ids, lengths) for ids in streams], part, num_parts) for part in range(num_parts)
        ]
    for number, ngrams in enumerate(asked):
        found = np.any([part[number] for part in parts], axis=0)
        assert found.tolist() == find_by_hand(ngrams, streams)


def test_every_window_of_a_long_stream_is_found_and_memory_stays_that_of_a_block():
    ids = np.random.default_rng(0).integers(0, 50_000, 3_000_000).astype(np.uint16)
    places = np.array([0, 1, 131_060, 131_071, 131_072, 1_000_000, len(ids) - 50])
    known = ids[places[:, None] + np.arange(50)]
    strange = known.copy()
    strange[:, 49] ^= 1
    tracemalloc.start()
    views = [ids[start : start + BLOCK_TOKENS] for start in range(0, len(ids), BLOCK_TOKENS)]
    found = find_ngrams([np.concatenate((known, strange)), known[:, :13]], [views])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[0].tolist() == [True] * 7 + [False] * 7
    assert found[1].all()
    assert peak < 24 * 2**20, "as int64 the stream alone has 24 MB"
