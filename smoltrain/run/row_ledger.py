"""Which rows a run has trained on, row by row: RUN/ledger.bin, and the comparison of two runs by it.

The digest (order.row_digest) of the row at global position p stands at byte 8 p, as little-endian uint64. The position
is the number of rows that the optimizer used before it, over all ranks and epochs. The digest 0 stands for one that
was lost. B: rows per step.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoltrain.config.config_file import read_provenance
from smoltrain.data.order import EMPTY_LEDGER, extend_ledger
from smoltrain.errors import Problem, UserError
from smoltrain.files import fsync_path, read_jsonl

LEDGER_FILE = "ledger.bin"
DIGEST_DTYPE = np.dtype("<u8")
COMPARE_CHUNK = 2**20  # digests that are compared at a time


class RowLedger:
    """The ledger as a run writes it. One process does: that of the first rank."""

    def __init__(self, path: Path, rows_consumed: int) -> None:
        """Open it to go on after `rows_consumed` rows: what a killed run wrote beyond is about to happen again.

        `num_lost_rows` of the rows before have no digest any more, for the file was missing or too short.
        """
        path.touch()
        fsync_path(path.parent)
        self._file = path.open("r+b")
        whole = min(path.stat().st_size // DIGEST_DTYPE.itemsize, rows_consumed)
        self.num_lost_rows = rows_consumed - whole
        self._file.truncate(whole * DIGEST_DTYPE.itemsize)
        self._file.truncate(rows_consumed * DIGEST_DTYPE.itemsize)  # POSIX fills up with zeros
        self._file.seek(0, 2)
        self._path = path

    def append(self, digests: np.ndarray) -> None:
        """The digests (B,) uint64 of a step's rows, in the order of their positions; out of this process at once."""
        self._file.write(digests.astype(DIGEST_DTYPE).tobytes())
        self._file.flush()

    def sync(self) -> None:
        """Force it to the disk: before a checkpoint that counts on it."""
        fsync_path(self._path)

    def close(self) -> None:
        """No more rows."""
        with contextlib.suppress(OSError):  # `append` has told of it
            self._file.close()


@dataclass(frozen=True)
class RowHistory:
    """What a run folder tells of its rows."""

    run: Path
    digests: np.ndarray  # (rows,) uint64, memory-mapped
    rows_per_step: int
    # Of metrics.jsonl, one entry per training step in it; the first is past 1 where the run went on from another one.
    steps: np.ndarray  # (steps,) int64
    rows: np.ndarray  # (steps,) int64, consumed up to the step's end
    chain: str  # the last data/ledger; '' if there is none
    damage: str = ""  # where metrics.jsonl cannot be read

    def place(self, position: int) -> tuple[int, int]:
        """(step, row within the step), both from 1, of a position. A step with skipped updates has more than B rows."""
        logged = int(np.searchsorted(self.rows, position, side="right"))  # steps that ended before
        step, rows = (int(self.steps[logged - 1]), int(self.rows[logged - 1])) if logged else (0, 0)
        more = (position - rows) // self.rows_per_step
        if logged < len(self.steps):
            more = min(more, int(self.steps[logged]) - step - 1)
        return step + more + 1, position - rows - more * self.rows_per_step + 1

    def last_step(self, num_rows: int) -> int:
        """The step of the last one of so many rows."""
        return self.place(num_rows - 1)[0]

    def chain_after(self, num_rows: int) -> str:
        """The hash chain after so many rows; '' where the ledger has fewer, or has lost one of them."""
        known = self.digests[:num_rows]
        return _hash_chain(known, self.rows_per_step) if len(known) == num_rows and known.all() else ""

    def fault(self) -> str:
        """How ledger.bin differs from what metrics.jsonl tells; '' if it does not.

        A run that lives, or was killed, may have more rows than its metrics: it writes them first.
        """
        if lost := int((self.digests == 0).sum()):
            return f"{self.run / LEDGER_FILE} has lost the digests of {lost:,} rows"
        told = int(self.rows[-1]) if len(self.rows) else 0
        own = self.chain_after(told)
        if own == (self.chain or EMPTY_LEDGER):
            return ""
        saw = f"ledger {own[:16]}" if own else f"{len(self.digests):,} rows"
        return f"{self.run / LEDGER_FILE} is not what its metrics say: {saw}, not {self.chain[:16]} after {told:,} rows"

    def __str__(self) -> str:
        num = len(self.digests)
        return f"{self.run}: {num:,} rows (steps 1 to {self.last_step(num)}), ledger {self.chain[:16] or 'not logged'}"


@dataclass(frozen=True)
class LedgerComparison:
    """Two histories, side by side over the rows that both have."""

    ours: RowHistory
    theirs: RowHistory
    common: int  # rows that both have
    lost: int  # of these, whose digest one of them has lost, so that they were not compared
    diverges_at: int | None  # the first position with another row

    def __str__(self) -> str:
        a, b, at = self.ours, self.theirs, self.diverges_at
        lines = []
        if a.rows_per_step != b.rows_per_step:
            per_step = self._describe_both(lambda history: f"{history.rows_per_step} rows")
            lines.append(f"a step is {per_step}: rows are compared by their position in the run")
        but = f", but for {self.lost:,} that are lost" if self.lost else ""
        if at is not None:
            place = self._describe_both(lambda history: "row {1} of step {0}".format(*history.place(at)))
            before = f"the same {at:,} rows{but}, then they part" if at else "they part at once"
            lines.append(f"{before}: at {place} (position {at:,})")
            return "\n".join([*lines, *(f"{h.run}: its digest is {int(h.digests[at]):016x}" for h in (a, b))])
        steps = self._describe_both(lambda history: f"steps 1 to {history.last_step(self.common)}")
        lines.append(f"the same {self.common:,} rows{but}: {steps}")
        longer = max(a, b, key=lambda history: len(history.digests))
        if more := len(longer.digests) - self.common:
            lines.append(f"{longer.run} has {more:,} more, to step {longer.last_step(self.common + more)}")
        return "\n".join(lines)

    def _describe_both(self, say: Callable[[RowHistory], str]) -> str:
        """What there is to say of either; once where it is the same."""
        ours, theirs = say(self.ours), say(self.theirs)
        return ours if ours == theirs else f"{ours} of {self.ours.run}, {theirs} of {self.theirs.run}"


def read_row_history(run: Path) -> RowHistory:
    """The history of a run folder. Errors: UserError if it has trained no row yet, or is not one the run wrote."""
    # The metrics first: a run that lives appends to the ledger before it does to them.
    damage: list[str] = []
    lines = [line for line in read_jsonl(run / "metrics.jsonl", say=damage.append) if "data/rows" in line]
    path = run / LEDGER_FILE
    num = path.stat().st_size // DIGEST_DTYPE.itemsize if path.is_file() else 0
    if not num:
        saw = f"no row in {path}" if path.is_file() else f"no {LEDGER_FILE} in {run}"
        raise UserError(Problem("there are no rows to verify", saw, "a run that trained a step", "the RUN argument"))
    return RowHistory(
        run,
        np.memmap(path, DIGEST_DTYPE, "r", shape=(num,)),
        read_provenance(run / "config.yaml")["rows_per_step"],
        np.array([line["step"] for line in lines], np.int64),
        np.array([line["data/rows"] for line in lines], np.int64),
        lines[-1]["data/ledger"] if lines else "",
        "".join(damage),
    )


def compare_row_histories(ours: RowHistory, theirs: RowHistory) -> LedgerComparison:
    """The first position at which two runs trained on different rows, up to the end of the shorter one."""
    common, lost = min(len(ours.digests), len(theirs.digests)), 0
    for start in range(0, common, COMPARE_CHUNK):
        a, b = (history.digests[start : min(start + COMPARE_CHUNK, common)] for history in (ours, theirs))
        known = (a != 0) & (b != 0)
        differ = np.flatnonzero(known & (a != b))
        if len(differ):
            return LedgerComparison(ours, theirs, common, lost, start + int(differ[0]))
        lost += len(known) - int(known.sum())
    return LedgerComparison(ours, theirs, common, lost, None)


def verify_ledgers(runs: Sequence[Path]) -> bool:
    """Whether the ledger of each run is what its metrics say, and two runs trained on the same rows; prints the facts.

    Errors: those of `read`.
    """
    histories = [read_row_history(run) for run in runs]
    faults = [fault for history in histories for fault in (history.fault(), history.damage) if fault]
    comparisons = [compare_row_histories(ours, theirs) for ours, theirs in itertools.pairwise(histories)]
    print(*histories, *faults, *comparisons, sep="\n")
    return not faults and all(comparison.diverges_at is None for comparison in comparisons)


def _hash_chain(digests: np.ndarray, rows_per_step: int) -> str:
    """The ledger's hash chain after these rows (order.extend), B of them at a time."""
    ledger = EMPTY_LEDGER
    for start in range(0, len(digests), rows_per_step):
        ledger = extend_ledger(ledger, int(digests[start : start + rows_per_step].sum(dtype=np.uint64)))
    return ledger
