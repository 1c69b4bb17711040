"""Which row is trained on when, and the proof of it. Integers only: no files, no ranks, no state.

Positions 0, 1, 2, ... count the rows that the run consumes, over all epochs. The row at a position is a function of
(seed, position, number of rows) alone. The world size decides only which rank fetches it.
"""

import functools
import hashlib

import numpy as np

WORD = 2**64
NO_STEPS = "0" * 32  # the ledger before the first step


@functools.lru_cache(maxsize=2)  # a step can span the end of one epoch and the start of the next
def permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The rows (num_rows,) int64 of one epoch in their order; read-only, for it is cached.

    Sorts raw PCG64 output: numpy promises that stream for ever, but not that of its own `Generator.permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(num_rows)
    rows = np.argsort(words, kind="stable")
    rows.setflags(write=False)
    return rows


def row_at(position: int, seed: int, num_rows: int) -> int:
    """The row at a position of the endless sequence."""
    epoch, place = divmod(position, num_rows)
    return int(permutation(seed, epoch, num_rows)[place])


def positions(start: int, index: int, micro_batch: int, rank: int, world_size: int) -> range:
    """The positions of a rank's micro-batch number `index` in the step whose first position is `start`."""
    first = start + (index * world_size + rank) * micro_batch
    return range(first, first + micro_batch)


def spread(num: int, num_rows: int) -> list[int]:
    """At most `num` distinct rows out of num_rows, ascending and evenly spaced."""
    num = min(num, num_rows)
    return [i * num_rows // num for i in range(num)]


def row_digest(position: int, row: int, tokens: np.ndarray) -> int:
    """Hash, in [0, 2^64), of where a row stands in the sequence, which row it is, and its token ids.

    The digest of a step is the SUM of its rows' modulo 2^64: sums commute, so it does not matter which rank held which
    row. An int64 all-reduce wraps around modulo 2^64 in just this way.
    """
    header = position.to_bytes(8, "little") + row.to_bytes(8, "little")
    digest = hashlib.blake2b(header + tokens.astype("<u4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def signed(digest: int) -> int:
    """The same 64 bits as a signed integer, as torch.int64 holds them."""
    return (digest + WORD // 2) % WORD - WORD // 2


def extend(ledger: str, step_digest: int) -> str:
    """The ledger (32 hex digits) after one more step: a hash chain, so equal ledgers mean equal histories."""
    step = (step_digest % WORD).to_bytes(8, "little")
    return hashlib.blake2b(bytes.fromhex(ledger) + step, digest_size=16).hexdigest()
