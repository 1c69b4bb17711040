"""Concatenate and chop: every target once, in order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.data.tokens import packing
from smoltrain.data.tokens.packing import count_rows, encode_documents
from tests.data.worlds import TOKENIZER

LENGTHS = st.integers(1, 12)
COUNTS = st.integers(0, 100)


def cut(num_tokens: int, length: int) -> np.ndarray:
    """All rows of a stream whose tokens are their own places."""
    count = count_rows(num_tokens, length)
    return np.arange(length + 1) + np.arange(count)[:, None] * length


@given(COUNTS, LENGTHS)
def test_every_target_is_predicted_once_from_the_token_before_it(num_tokens: int, length: int):
    rows = cut(num_tokens, length)
    inputs, labels = rows[:, :-1], rows[:, 1:]
    assert labels.flatten().tolist() == list(range(1, labels.size + 1))
    assert (labels == inputs + 1).all()
    assert 0 <= max(0, num_tokens - 1) - labels.size < length


# --- documents ---

TEXTS = st.lists(st.text("ab c\u00e9", min_size=1, max_size=30), max_size=12)


@given(TEXTS, st.integers(1, 40), st.integers(1, 40))
def test_the_tokens_do_not_depend_on_how_much_is_tokenised_at_once(texts: list[str], characters: int, longest: int):
    before, packing.ENCODE_CHARACTERS = packing.ENCODE_CHARACTERS, longest  # of a piece
    try:
        found = list(encode_documents(enumerate(texts), TOKENIZER, np.uint16, characters))
    finally:
        packing.ENCODE_CHARACTERS = before
    for number, text in enumerate(texts):
        pieces = [piece for piece in found if piece.about == number]
        ids = np.concatenate([piece.ids for piece in pieces]).tolist()
        assert ids == [*TOKENIZER.encode(text), TOKENIZER.separator_id]
        assert {piece.ids.dtype.name for piece in pieces} == {"uint16"}
        assert [piece.offset for piece in pieces] == np.cumsum([0, *(len(p.ids) for p in pieces)])[:-1].tolist()
    assert [piece.about for piece in found] == sorted(piece.about for piece in found)
