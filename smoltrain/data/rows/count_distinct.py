"""How many different things there were, counted in fixed memory: HyperLogLog (Flajolet et al. 2007)."""

import base64
import math
import zlib

import numpy as np

INDEX_BITS = 14
NUM_REGISTERS = 2**INDEX_BITS  # one byte each; the standard error is 1.04 / sqrt(NUM_REGISTERS) = 0.8 %
REST_BITS = np.uint64(64 - INDEX_BITS)


class DistinctCounter:
    """The set of all 64-bit hashes that were added, as far as its size is concerned: in any order, however often.

    The hashes must be evenly spread, as xxh3's are.
    """

    def __init__(self, registers: np.ndarray | None = None) -> None:
        self.registers = np.zeros(NUM_REGISTERS, np.uint8) if registers is None else registers

    def add(self, hashes: np.ndarray) -> None:
        """Hashes (n,) uint64. The first bits choose a register, which keeps the longest run of zeros behind them."""
        rest = hashes & ((np.uint64(1) << REST_BITS) - np.uint64(1))
        _, bit_length = np.frexp(rest.astype(np.float64))  # exact below 2^53
        rank = (int(REST_BITS) + 1 - bit_length).astype(np.uint8)
        np.maximum.at(self.registers, hashes >> REST_BITS, rank)

    def merge(self, other: "DistinctCounter") -> None:
        """Also all that the other one has seen."""
        np.maximum(self.registers, other.registers, out=self.registers)

    def estimate(self) -> float:
        """How many different hashes there were.

        The estimator of Ertl 2017 (arXiv 1702.01284, algorithm 6) has no bias from 0 on. It does without the change to
        linear counting for small counts, and the tables of bias behind it, that Heule et al. 2013 need.
        """
        counts = np.bincount(self.registers, minlength=1)
        empty = counts[0] / NUM_REGISTERS
        if empty == 1:
            return 0.0
        series, power, weight = empty, empty, 1.0  # sigma(x) = x + sum over k of x^(2^k) 2^(k - 1)
        while (term := (power := power * power) * weight) > series * 1e-16:
            series, weight = series + term, 2 * weight
        ranks = np.arange(1, len(counts))
        total = NUM_REGISTERS * series + float((counts[1:] * 0.5**ranks).sum())
        return NUM_REGISTERS**2 / (2 * math.log(2) * total)

    def to_text(self) -> str:
        """For JSON: at most some 16 kB, less while few registers are used."""
        return base64.b64encode(zlib.compress(self.registers.tobytes(), 9)).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> "DistinctCounter":
        """The sketch that `to_text` wrote."""
        registers = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).copy()
        assert len(registers) == NUM_REGISTERS, "the text is of another kind of sketch"
        return cls(registers)
