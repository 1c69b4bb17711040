"""Where documents begin, in tensors of few lengths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smoltrain.kernels.document_starts import MEAN_LENGTHS, find_document_starts, padded_length

RECOMPILE_LIMIT = 8  # torch._dynamo.config.recompile_limit, whose import takes a second


def positions_of(begins: list[list[bool]]) -> Tensor:
    """A row for each list; a document begins with the row, and wherever it says so."""
    rows = []
    for begins_T in begins:
        place = -1
        row = []
        for begin in begins_T:
            place = 0 if begin else place + 1
            row.append(place)
        rows.append(row)
    return torch.tensor(rows)


@given(
    st.integers(1, 40).flatmap(
        lambda T: st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=5)
    ),
    st.booleans(),
)
def test_places_of_documents_then_the_number_of_tokens(begins: list[list[bool]], is_known: bool) -> None:
    positions = positions_of(begins)
    places = [i for i, position in enumerate(positions.flatten().tolist()) if position == 0]
    starts = find_document_starts(positions, len(places) if is_known else None)
    N = positions.numel()
    assert starts.dtype == torch.int32
    assert len(starts) == padded_length(len(places), N) + 1
    assert starts.tolist() == places + [N] * (len(starts) - len(places))


def test_more_documents_than_were_told_of_is_no_silent_mistake() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        find_document_starts(torch.zeros(1, 200, dtype=torch.long), 3)


def test_all_numbers_of_documents_have_fewer_lengths_than_torch_makes_code_for() -> None:
    for num_tokens in (1, 63, 64, 65, 4096, 32_768):
        lengths = [padded_length(n, num_tokens) for n in range(1, num_tokens + 1)]
        assert all(length >= n for n, length in enumerate(lengths, 1))
        assert max(lengths) == num_tokens
        assert lengths == sorted(lengths)
        assert len(set(lengths)) <= len(MEAN_LENGTHS) < RECOMPILE_LIMIT


def test_texts_of_any_usual_length_have_one() -> None:
    """16 rows of 2,048 tokens: documents of 300 to 5,000 tokens on average, and of 70 to 230."""
    assert {padded_length(16 + 32_768 // mean, 32_768) for mean in range(300, 5_000)} == {128}
    assert {padded_length(16 + 32_768 // mean, 32_768) for mean in range(70, 230)} == {512}
