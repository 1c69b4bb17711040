"""Which row is trained on when, and the proof of it: pure functions, without files and without state.

Positions 0, 1, 2, ... count the rows that the run consumes. A step is `rows_per_step` positions. Which source and which
virtual stream a position belongs to is a function of the position alone; the world size decides only which rank fetches
its row. So does every shuffle follow from (seed, what is shuffled) alone.

Why this is our own: a sampler that holds a permutation takes memory that grows with the data, and a distributed one
deals by the world size. Here any place of any epoch is computed in constant memory, so a run resumes anywhere, on any
number of ranks.
"""

import functools
import hashlib

import numpy as np
import xxhash

TWO_TO_64 = 2**64
EMPTY_LEDGER = "0" * 32  # the ledger before the first step
MIX_WINDOW = 1000  # rows: any window of so many holds each source's exact share
MAX_STREAMS = 64
MAX_SORTED = 2**16  # things that are shuffled by sorting
FEISTEL_ROUNDS = 6


def permute_places(places: np.ndarray, num: int, *key: int) -> np.ndarray:
    """Where the permutation of 0..num-1 that `key` names sends these places, int64.

    Up to MAX_SORTED things are sorted by pseudo-random words. More of them go through a Feistel network (Luby &
    Rackoff 1988) over the next power of four, again and again until they fall below `num` (Black & Rogaway 2002): any
    place of any epoch costs the same, and nothing of the size of the data is ever held.
    """
    if num <= MAX_SORTED:
        return _small_permutation(num, key)[places]
    half = ((num - 1).bit_length() + 1) // 2
    low = np.uint64(2**half - 1)
    permuted = np.asarray(places, np.uint64).copy()
    todo = np.ones(permuted.shape, bool)
    while todo.any():
        left = permuted[todo] >> np.uint64(half)
        right = permuted[todo] & low
        for round_key in _round_keys(key):
            left, right = right, left ^ (_splitmix64(right + round_key) & low)
        permuted[todo] = left << np.uint64(half) | right
        todo = permuted >= num  # fewer than three quarters: the network is over less than four times `num`
    return permuted.astype(np.int64)


@functools.lru_cache(maxsize=64)
def _small_permutation(num: int, key: tuple[int, ...]) -> np.ndarray:
    first_key, second_key, *_ = _round_keys(key)
    words = _splitmix64(_splitmix64(np.arange(num, dtype=np.uint64) + first_key) ^ second_key)
    places = np.argsort(words, kind="stable")
    places.setflags(write=False)
    return places


@functools.lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> tuple[np.uint64, ...]:
    """FEISTEL_ROUNDS pseudo-random words out of a key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return tuple(np.frombuffer(digest, np.dtype("<u8")))


def _splitmix64(words: np.ndarray) -> np.ndarray:
    """Each 64-bit word scrambled, one to one (the finalizer of SplitMix64, Steele et al. 2014)."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


# ---- which source and which stream


def largest_num_streams(rows_per_step: int, world_size: int) -> int:
    """The most virtual streams, up to MAX_STREAMS, that divide the rows of a step and that the ranks divide.

    Many streams let many numbers of ranks take over the run later. More ranks than MAX_STREAMS get one each.
    """
    fits = [n for n in range(world_size, MAX_STREAMS + 1, world_size) if rows_per_step % n == 0]
    return max(fits, default=world_size)


def streams_of_positions(positions: np.ndarray, num_streams: int) -> np.ndarray:
    """The stream (n,) of each position (n,). Each aligned block of `num_streams` positions has each stream once.

    It begins with a pseudo-random one: in a regular order a stream would keep meeting the same source of a mix.
    """
    if num_streams == 1:
        return np.zeros(len(positions), np.int64)
    begins = _splitmix64((positions // num_streams).astype(np.uint64)) % np.uint64(num_streams)
    return (positions + begins.astype(np.int64)) % num_streams


@functools.lru_cache(maxsize=16)
def mix_pattern(weights: tuple[float, ...]) -> np.ndarray:
    """The source (MIX_WINDOW,) of each position modulo MIX_WINDOW: shares rounded to thousandths, spread evenly.

    As it repeats, ANY window of MIX_WINDOW rows holds exactly these shares. A source of positive weight has at least
    one row in it; weight 0 has none.
    """
    counts = apportion_by_weight(MIX_WINDOW, weights)
    when = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
    source = np.repeat(np.arange(len(weights)), counts)
    pattern = source[np.lexsort((source, when))]
    pattern.setflags(write=False)
    return pattern


def apportion_by_weight(num: int, weights: tuple[float, ...]) -> list[int]:
    """`num` things dealt out by weight, with the largest remainders rounded up; each positive weight gets at least one.

    num must be at least the number of positive weights.
    """
    exact = np.array(weights) / sum(weights) * num
    counts = np.maximum(np.floor(exact), np.array(weights) > 0).astype(int)
    while counts.sum() < num:
        counts[np.argmax(np.where(exact > 0, exact - counts, -np.inf))] += 1
    while counts.sum() > num:  # where tiny weights were given one
        counts[np.argmin(np.where(counts > 1, exact - counts, np.inf))] -= 1
    return counts.tolist()


def count_earlier_equals(values: np.ndarray) -> np.ndarray:
    """For each element (n,), how many equal ones stand before it."""
    counts = np.empty(len(values), np.int64)
    for value in np.unique(values):
        equal = values == value
        counts[equal] = np.arange(equal.sum())
    return counts


def evenly_spaced_rows(num: int, num_rows: int) -> list[int]:
    """At most `num` distinct rows out of num_rows, ascending and evenly spaced."""
    num = min(num, num_rows)
    return [i * num_rows // num for i in range(num)]


# ---- the ledger


def hash_rows(positions: np.ndarray, row_ids: np.ndarray, tokens: np.ndarray) -> list[int]:
    """Of each row a hash in [0, 2^64) of its position (n,), which row it is (n,), and its token ids (n, T + 1).

    The digest of a step is the SUM of its rows' modulo 2^64: sums commute, so it does not matter which rank held which
    row. An int64 all-reduce wraps around modulo 2^64 in just this way.
    """
    seeds = _splitmix64(positions.astype(np.uint64) + _splitmix64(row_ids.astype(np.uint64)))
    return [xxhash.xxh3_64_intdigest(row, seed) for row, seed in zip(tokens, seeds.tolist(), strict=True)]


def extend_ledger(ledger: str, step_digest: int) -> str:
    """The ledger (32 hex digits) after one more step: a hash chain, so equal ledgers mean equal histories."""
    step = (step_digest % TWO_TO_64).to_bytes(8, "little")
    return hashlib.blake2b(bytes.fromhex(ledger) + step, digest_size=16).hexdigest()
