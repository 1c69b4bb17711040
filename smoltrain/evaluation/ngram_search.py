"""Which n-grams of token ids stand in streams of any length: exact, in memory that does not grow with the streams.

The n-grams that are asked for are hashed and sorted; then the streams are read once, and the hash of each of their
windows is looked up (Karp & Rabin 1987). A window with the hash of an n-gram is compared with it token by token, so
that a collision costs time and never the truth.

Suffixes of names are shapes: K n-grams, N tokens of each, W windows of a block.
"""

from collections.abc import Iterable, Sequence

import numpy as np

BLOCK_TOKENS = 2**17  # whose hashes stay in a core's cache
COMPARED_AT_ONCE = 2**12  # windows
# The hash of the ids t is the sum of (t[j] + 1) x BASE^j modulo 2^64. BASE is odd, so that it has an inverse there.
BASE = 0x9E3779B97F4A7C15
INVERSE_BASE = pow(BASE, -1, 2**64)
FILTER_BITS = 20  # of a hash, by which most windows are told to be none of the n-grams


def find_ngrams(
    ngrams: Sequence[np.ndarray], streams: Iterable[Iterable[np.ndarray]], part: int = 0, num_parts: int = 1
) -> list[np.ndarray]:
    """For each array (K, N) of n-grams, which of them (K,) stand somewhere in a stream.

    A stream is its token ids in order, cut into views of at most BLOCK_TOKENS; an n-gram may lie across cuts. Of
    `num_parts` processes each looks through its part of the views, and an n-gram is found if any of them finds it.
    """
    sets = [_NgramSet(array) for array in ngrams]
    longest = max((ngram_set.length for ngram_set in sets), default=1)
    for stream in streams:
        tail = np.empty(0, np.int64)  # the last ids before a view: all but one of the longest n-gram
        for number, view in enumerate(stream):
            if number % num_parts == part:
                ids = np.concatenate((tail, view))
                sums = _sum_prefixes(ids)
                for ngram_set in sets:
                    ngram_set.search(ids, sums)
            tail = np.concatenate((tail, view[-longest:]))
            tail = tail[max(0, len(tail) - longest + 1) :]
    return [ngram_set.is_found for ngram_set in sets]


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


# Enough for a block and the tail before it, unless n-grams are longer than a block, which `_sum_prefixes` refuses.
_POWERS = _powers(BASE, 2 * BLOCK_TOKENS)
_INVERSE_POWERS = _powers(INVERSE_BASE, 2 * BLOCK_TOKENS)


def _sum_prefixes(ids: np.ndarray) -> np.ndarray:
    """The sums of (t[j] + 1) x BASE^j over the first 0, 1, ... ids; the hash of a window is a difference of two."""
    assert len(ids) <= len(_POWERS), "an n-gram is longer than a block"
    terms = ids.astype(np.uint64)
    terms += np.uint64(1)
    terms *= _POWERS[: len(ids)]
    sums = np.zeros(len(ids) + 1, np.uint64)
    np.cumsum(terms, out=sums[1:])
    return sums


def _hash_windows(sums: np.ndarray, length: int) -> np.ndarray:
    """The hash (W,) of each window of `length` ids."""
    hashes = sums[length:] - sums[:-length]
    hashes *= _INVERSE_POWERS[: len(hashes)]
    return hashes


class _NgramSet:
    """n-grams of one length, and which of them were found so far."""

    def __init__(self, ngrams_KN: np.ndarray) -> None:
        self.length = ngrams_KN.shape[1]
        distinct, inverse = np.unique(ngrams_KN, axis=0, return_inverse=True)
        hashes = ((distinct.astype(np.uint64) + np.uint64(1)) * _POWERS[: self.length]).sum(axis=1, dtype=np.uint64)
        order = np.argsort(hashes)
        self._ngrams = distinct[order]
        self._hashes = hashes[order]
        self._is_found = np.zeros(len(order), bool)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        self._places = place[inverse.reshape(-1)]  # of each n-gram that was given among the distinct ones
        self._may_be_known = np.zeros(2**FILTER_BITS, bool)
        self._may_be_known[_filter_keys(hashes)] = True

    @property
    def is_found(self) -> np.ndarray:
        """(K,) in the order in which they were given."""
        return self._is_found[self._places]

    def search(self, ids: np.ndarray, sums: np.ndarray) -> None:
        """Note which of the n-grams stand in a block of ids, whose prefixes have these sums."""
        if len(ids) < self.length or self._is_found.all():
            return
        hashes = _hash_windows(sums, self.length)
        starts = np.flatnonzero(self._may_be_known[_filter_keys(hashes)])
        hashes = hashes[starts]
        numbers = np.searchsorted(self._hashes, hashes)
        while len(starts):
            is_candidate = numbers < len(self._hashes)
            is_candidate[is_candidate] = self._hashes[numbers[is_candidate]] == hashes[is_candidate]
            starts = starts[is_candidate]
            hashes = hashes[is_candidate]
            numbers = numbers[is_candidate]
            self._compare(ids, starts, numbers)
            numbers = numbers + 1  # another n-gram of the same hash

    def _compare(self, ids: np.ndarray, starts: np.ndarray, numbers: np.ndarray) -> None:
        """Note which windows are the n-grams of these numbers, id by id."""
        windows = np.lib.stride_tricks.sliding_window_view(ids, self.length)
        for first in range(0, len(starts), COMPARED_AT_ONCE):
            chosen = slice(first, first + COMPARED_AT_ONCE)
            is_open = ~self._is_found[numbers[chosen]]
            own = numbers[chosen][is_open]
            is_equal = (windows[starts[chosen][is_open]] == self._ngrams[own]).all(axis=1)
            self._is_found[own[is_equal]] = True


def _filter_keys(hashes: np.ndarray) -> np.ndarray:
    """The highest bits of hashes."""
    return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)
