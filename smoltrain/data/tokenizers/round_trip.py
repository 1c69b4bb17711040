"""How much of a text its ids say: what comes back when they are decoded, and how many bytes they stand for."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from smoltrain.data.tokenizers.encode_pieces import TokenPiece
from smoltrain.data.tokenizers.tokenizer import Tokenizer

DECODED_CHARACTERS = 2**18  # of each part of the data that are decoded again
LOST_SHARE_TO_WARN = 0.001  # of the bytes of a sample


@dataclass(frozen=True)
class RoundTripCounts:
    """What was counted of some documents; separators are no part of it."""

    tokens: int = 0
    unspelled: int = 0  # bytes of the text over those that its ids stand for (Tokenizer.bytes_per_id); may be negative
    sampled: int = 0  # bytes of what was decoded again
    lost: int = 0  # bytes of it that did not come back

    def __add__(self, other: "RoundTripCounts") -> "RoundTripCounts":
        return RoundTripCounts(
            self.tokens + other.tokens,
            self.unspelled + other.unspelled,
            self.sampled + other.sampled,
            self.lost + other.lost,
        )

    @property
    def lost_share(self) -> float:
        """Of the bytes of the sample."""
        return self.lost / max(1, self.sampled)

    @property
    def unspelled_per_token(self) -> float:
        """Bytes of the text that each token stands for beside its own."""
        return self.unspelled / max(1, self.tokens)


class RoundTripCounter:
    """Counts over the pieces of documents; the first DECODED_CHARACTERS or a few more are decoded again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes_per_id = tokenizer.bytes_per_id()
        self._characters_left = DECODED_CHARACTERS
        self.found = RoundTripCounts()

    def add(self, piece: TokenPiece[Any]) -> None:
        """Count one more piece."""
        num_bytes = len(piece.text.encode())
        num_tokens = int((piece.ids != self._tokenizer.separator_id).sum())
        num_unspelled = num_bytes - int(self._bytes_per_id[piece.ids].sum())
        self.found += RoundTripCounts(num_tokens, num_unspelled)
        if self._characters_left > 0:
            self._characters_left -= len(piece.text)
            decoded = self._tokenizer.decode(piece.ids.tolist())
            self.found += RoundTripCounts(sampled=num_bytes, lost=lost_bytes(piece.text, decoded))


def lost_bytes(text: str, decoded: str) -> int:
    """Bytes (UTF-8) of characters that are more often in a text than in what came back, wherever they stand."""
    missing = Counter(text) - Counter(decoded)
    return sum(len(character.encode()) * count for character, count in missing.items())
