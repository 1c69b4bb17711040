"""Which characters of a source a BPE is trained on where all are too many: a fair sample, the same in every process.

Two things can be too many. Characters: then each file gives its first ones, in proportion to its bytes, so that no
language is left out because its file is named late. Different words, which take the library's memory: then whole pieces
are left out, spread evenly over all that would be read.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokenizers.tokenizer import split_text

NUM_PLACES = 256  # where a source is read at most: a file with this share of its bytes, or more, is always read
PIECE_CHARACTERS = 2**16  # that are kept or left out together
NUM_RANKS = 2**10  # of pieces: those of the lowest ranks are kept
RANK_STEP = 633  # near NUM_RANKS times the golden ratio, and odd: pieces of low ranks lie evenly among the others
WORD = re.compile(r"\w{1,64}|[^\w\s]{8,64}|\s{8,64}")  # what may be new each time; about what the library counts
WORD_SAMPLING = 64  # one word of so many is remembered


class DistinctWordCounter:
    """How many bytes the different words of a text have together, estimated: of English few, of Chinese all.

    The trainer's memory grows with them. Equal texts give equal estimates in every process.
    """

    def __init__(self) -> None:
        self._lowest_ranks: dict[bytes, int] = {}  # of each word that is remembered, among the pieces that have it

    @property
    def num_bytes(self) -> int:
        """Of all words."""
        return WORD_SAMPLING * sum(len(raw) for raw in self._lowest_ranks)

    def add(self, text: str, rank: int = 0) -> None:
        """More of the text: a piece of this rank."""
        for word in set(WORD.findall(text)):
            raw = word.encode()
            if zlib.crc32(raw) % WORD_SAMPLING == 0:
                self._lowest_ranks[raw] = min(rank, self._lowest_ranks.get(raw, rank))

    def most_ranks(self, max_bytes: float) -> int:
        """How many ranks, from the lowest on, have pieces whose different words come to max_bytes at most; 1 or more.

        NUM_RANKS where nothing need be left out.
        """
        new_bytes = [0] * NUM_RANKS  # of words that no lower rank has
        for raw, rank in self._lowest_ranks.items():
            new_bytes[rank] += WORD_SAMPLING * len(raw)
        num_bytes = 0
        for rank, more in enumerate(new_bytes):
            num_bytes += more
            if num_bytes > max_bytes:
                return max(1, rank)
        return NUM_RANKS


def rank_piece(number: int) -> int:
    """The rank of a source's piece of that number."""
    return number * RANK_STEP % NUM_RANKS


def read_fair_pieces(
    shards: Sequence[Shard], max_characters: float, read_texts: Callable[[Shard], Iterator[str]]
) -> Iterator[str]:
    """The texts of some files in pieces: the first of each, max_characters together, by the files' bytes.

    Files that are too small to be read in proportion, as a million of one page each, are read whole at NUM_PLACES
    places. What a file has too few of, the next one gives.
    """
    num_read = 0
    for shard, quota in zip(shards, _plan_quotas(shards, max_characters), strict=True):
        if num_read >= quota:
            continue
        for piece in _split_texts(read_texts(shard)):
            num_left = quota - num_read
            taken = piece if len(piece) <= num_left else piece[: math.ceil(num_left)]
            yield taken
            num_read += len(taken)
            if num_read >= quota:
                break


def _plan_quotas(shards: Sequence[Shard], max_characters: float) -> Iterator[float]:
    """For each file, how many characters are read of it and those before it."""
    all_bytes = max(1, sum(shard.size or 0 for shard in shards))
    num_bytes = 0
    for shard in shards:
        num_bytes += shard.size or 0
        num_places = math.ceil(NUM_PLACES * num_bytes / all_bytes)
        yield max_characters * max(1, num_places) / NUM_PLACES


def _split_texts(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        yield from split_text(text, PIECE_CHARACTERS)
