"""Documents to one stream of tokens, and the stream to rows: concatenate and chop, so that no token is wasted.

T is the sequence length in targets, N the tokens of the stream. Row i is tokens[i*T : i*T + T + 1]: T + 1 ids, of which
the last is the first of row i + 1. Thus every token but the first is a target exactly once; up to T - 1 at the end
of the stream fill no row.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike


def stream(ids: Sequence[int], separator_id: int | None, dtype: DTypeLike) -> np.ndarray:
    """A document's part of the stream: its ids and the separator. Of a part that does not end it (None): its ids."""
    return np.asarray(ids if separator_id is None else [*ids, separator_id], dtype)


def num_rows(num_tokens: int, sequence_length: int) -> int:
    """How many rows N tokens hold."""
    return max(0, num_tokens - 1) // sequence_length


def row(tokens: np.ndarray, index: int, sequence_length: int) -> np.ndarray:
    """Row `index` of the stream, (T + 1,), not copied. It must exist: 0 <= index < num_rows."""
    start = index * sequence_length
    return tokens[start : start + sequence_length + 1]


def inputs_and_labels(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., T + 1) ids into inputs (..., T) and, one place on, the ids to predict from them (..., T); not copied."""
    return rows[..., :-1], rows[..., 1:]
