"""Concatenate and chop: every target once, in order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.data import packing

LENGTHS = st.integers(1, 12)
COUNTS = st.integers(0, 100)


def test_a_separator_ends_each_document():
    parts = [packing.stream(*part, np.uint16) for part in (([5], None), ([6], 0), ([], 0), ([7], 0))]
    stream = np.concatenate(parts)
    assert stream.tolist() == [5, 6, 0, 0, 7, 0]
    assert stream.dtype == np.uint16


@given(COUNTS, LENGTHS)
def test_every_target_is_predicted_once_from_the_token_before_it(num_tokens: int, length: int):
    stream = np.arange(num_tokens)
    rows = [packing.row(stream, i, length) for i in range(packing.num_rows(num_tokens, length))]
    assert all(len(row) == length + 1 for row in rows)
    targets = [label for row in rows for label in packing.inputs_and_labels(row)[1].tolist()]
    assert targets == list(range(1, len(targets) + 1))
    assert 0 <= max(0, num_tokens - 1) - len(targets) < length
    assert all((labels == inputs + 1).all() for inputs, labels in map(packing.inputs_and_labels, rows))


@given(COUNTS, LENGTHS)
def test_rows_share_exactly_one_token(num_tokens: int, length: int):
    stream = np.arange(num_tokens)
    for i in range(1, packing.num_rows(num_tokens, length)):
        assert packing.row(stream, i - 1, length)[-1] == packing.row(stream, i, length)[0]


def test_many_rows_are_cut_at_once():
    inputs, labels = packing.inputs_and_labels(np.arange(6).reshape(2, 3))
    assert (inputs.tolist(), labels.tolist()) == ([[0, 1], [3, 4]], [[1, 2], [4, 5]])
