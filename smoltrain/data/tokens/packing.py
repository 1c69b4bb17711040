"""Packing: documents to one stream of tokens, and the stream to rows. Concatenate and chop, so that no token is wasted.

T is the sequence length in targets, N the tokens of the stream. Row i is tokens[i*T : i*T + T + 1]: T + 1 ids, of which
the last is the first of row i + 1. Thus every token but the first is a target exactly once; up to T - 1 at the end
of the stream fill no row.
"""

from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from smoltrain.data.tokenizers.encode_pieces import TokenPiece
from smoltrain.data.tokenizers.tokenizer import Tokenizer, split_text

T = TypeVar("T")
ENCODE_CHARACTERS = 2**19  # tokenised in one call: enough to keep some cores busy, in about 50 MB of English


class TextPiece(NamedTuple, Generic[T]):
    """A piece of a document's text; `about` is the caller's."""

    about: T
    text: str
    begins: bool  # the document
    ends: bool


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds the ids."""
    return np.dtype(np.uint16 if tokenizer.num_ids <= 2**16 else np.uint32)


def encode_documents(
    documents: Iterable[tuple[T, str]], tokenizer: Tokenizer, dtype: DTypeLike, characters: int = ENCODE_CHARACTERS
) -> Iterator[TokenPiece[T]]:
    """The tokens of (about, text) pairs, in order; most documents are one piece, long ones several.

    About so many characters are read before the first tokens come. The tokens do not depend on it.
    """
    offset = 0
    for batch in _batch_pieces(documents, characters):
        texts = [piece.text for piece in batch]
        is_continuation = [not piece.begins for piece in batch]
        for piece, ids in zip(batch, tokenizer.encode_batch(texts, is_continuation), strict=True):
            tokens = np.asarray([*ids, tokenizer.separator_id] if piece.ends else ids, dtype)
            yield TokenPiece(piece.about, offset, tokens, piece.text)
            offset = 0 if piece.ends else offset + len(tokens)


def count_rows(num_tokens: int, sequence_length: int) -> int:
    """How many rows N tokens hold."""
    return max(0, num_tokens - 1) // sequence_length


def _batch_pieces(documents: Iterable[tuple[T, str]], characters: int) -> Iterator[list[TextPiece[T]]]:
    """The documents' pieces in lists of about so many characters.

    A list is longer by one piece at most, whatever the texts.
    """
    batch, size = [], 0
    for about, text in documents:
        texts = list(split_text(text, ENCODE_CHARACTERS))
        for number, piece in enumerate(texts):
            batch.append(TextPiece(about, piece, begins=number == 0, ends=number == len(texts) - 1))
            size += len(piece)
            if size >= characters:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
