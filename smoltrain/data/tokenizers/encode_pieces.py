"""Encode later pieces of a document without the space or the strip that belongs to its start.

Many tokenizers put a space before a text, or strip it. A piece that begins behind a cut would get a space that the text
does not have there, or lose one that it has.
"""

import json
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import tokenizers

T = TypeVar("T")


def build_continuation_tokenizer(inner: tokenizers.Tokenizer, definition: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer for pieces that continue a document: `inner` itself where it treats no start in its own way.

    `definition` is inner's JSON, as far as its normalizer and its pre-tokenizer.
    """
    changed = {
        "normalizer": _continuation_normalizer(definition["normalizer"]),
        "pre_tokenizer": _continuation_pre_tokenizer(definition["pre_tokenizer"]),
    }
    if all(definition[key] == value for key, value in changed.items()):
        return inner
    copy = tokenizers.Tokenizer.from_str(json.dumps(json.loads(inner.to_str()) | changed))
    copy.encode_special_tokens = inner.encode_special_tokens
    return copy


def _continuation_normalizer(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Strip":
        return normalizer | {"strip_left": False}  # at its right a document may end
    if normalizer["type"] == "Sequence":
        parts = [_continuation_normalizer(part) for part in normalizer["normalizers"]]
        return normalizer | {"normalizers": [part for part in parts if part is not None]}
    return normalizer


def _continuation_pre_tokenizer(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if pre_tokenizer is None:
        return None
    if pre_tokenizer["type"] == "Sequence":
        parts = [_continuation_pre_tokenizer(part) for part in pre_tokenizer["pretokenizers"]]
        return pre_tokenizer | {"pretokenizers": parts}
    if pre_tokenizer["type"] == "ByteLevel":
        return pre_tokenizer | {"add_prefix_space": False}
    if pre_tokenizer["type"] == "Metaspace":
        return pre_tokenizer | {"prepend_scheme": "never"}
    return pre_tokenizer


@dataclass(frozen=True)
class TokenPiece(Generic[T]):
    """Consecutive tokens (n,) of one document, the first of which is its number `offset`; `about` is the caller's.

    The separator is the last token of a document's last piece.
    """

    about: T
    offset: int
    ids: np.ndarray
    text: str = ""  # what the ids were made of
