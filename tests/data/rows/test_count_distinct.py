"""The count is near enough, whatever the order, however often, and however it is put together."""

import json

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.data.rows.count_distinct import INDEX_BITS, NUM_REGISTERS, DistinctCounter

STANDARD_ERROR = 0.0081
HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=50).map(lambda found: np.array(found, np.uint64))


def hashes(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, num, np.uint64)


def of(*parts: np.ndarray) -> DistinctCounter:
    sketch = DistinctCounter()
    for part in parts:
        sketch.add(part)
    return sketch


def test_nothing_is_zero():
    assert of().estimate() == of(hashes(0)).estimate() == 0


@pytest.mark.parametrize("num", [1, 10, 1_000, 30_000, 50_000, 70_000, 100_000, 1_000_000])
def test_the_error_is_bounded(num: int):
    """Four standard errors; the middle counts are where the classic estimator changes formula and is biased."""
    errors = [of(hashes(num, seed)).estimate() / num - 1 for seed in range(5)]
    assert max(map(abs, errors)) < 4 * STANDARD_ERROR
    assert abs(np.mean(errors)) < 4 * STANDARD_ERROR / 5**0.5


def test_real_hashes_of_texts_that_hardly_differ():
    texts = np.array([xxhash.xxh3_64_intdigest(f"document {i}".encode()) for i in range(20_000)], np.uint64)
    assert of(texts).estimate() == pytest.approx(20_000, rel=4 * STANDARD_ERROR)


def test_a_repeated_corpus_counts_once():
    corpus = hashes(5_000)
    assert of(*[corpus] * 30).estimate() == of(corpus).estimate()


@given(HASHES, HASHES)
def test_order_and_parts_do_not_matter(one: np.ndarray, two: np.ndarray):
    merged = of(one)
    merged.merge(of(two))
    together = np.concatenate([two[::-1], one, two])
    assert merged.registers.tolist() == of(two, one).registers.tolist() == of(together).registers.tolist()


@given(HASHES)
def test_registers_against_the_definition(found: np.ndarray):
    want = [0] * NUM_REGISTERS
    for value in map(int, found):
        bits = f"{value:064b}"
        rest = bits[INDEX_BITS:]
        rank = rest.index("1") + 1 if "1" in rest else len(rest) + 1
        want[int(bits[:INDEX_BITS], 2)] = max(want[int(bits[:INDEX_BITS], 2)], rank)
    assert of(found).registers.tolist() == want


@given(HASHES)
def test_a_round_trip_through_json(found: np.ndarray):
    sketch = of(found)
    again = DistinctCounter.from_text(json.loads(json.dumps(sketch.to_text())))
    assert again.estimate() == sketch.estimate()
    again.add(hashes(3))  # it goes on counting
    assert again.registers.tolist() == of(found, hashes(3)).registers.tolist()


def test_memory_is_fixed():
    few, many = of(hashes(10)), of(hashes(2_000_000))
    assert few.registers.nbytes == many.registers.nbytes == 2**14
    assert len(few.to_text()) < 200
    assert len(many.to_text()) < 12_000
