"""The row ledger: which rows a run has trained on, row by row, in RUN/ledger.bin; and two runs compared by it.

The digest (order.row_digest) of the row at global position p stands at byte 8 p, as little-endian uint64. The position
is the number of rows that the optimizer used before it, over all ranks and epochs. The digest 0 stands for one that
was lost. B: rows per step.
"""

import contextlib
import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoltrain.config.config_file import read_provenance
from smoltrain.data.order import EMPTY_LEDGER, extend_ledger
from smoltrain.errors import Problem, UserError
from smoltrain.files import METRICS_FILE, fsync_path, read_jsonl

LEDGER_FILE = "ledger.bin"
DIGEST_DTYPE = np.dtype("<u8")
COMPARE_CHUNK = 2**20  # digests that are compared at a time


class RowLedger:
    """The ledger as a run writes it. One process does: that of the first rank."""

    def __init__(self, path: Path, rows_consumed: int) -> None:
        """Open it to go on after `rows_consumed` rows, and cut off those that a killed run wrote beyond.

        Where the file was missing or too short, zeros stand for the digests of `num_lost_rows`.
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
        with contextlib.suppress(OSError):  # of a full disk, which `append` has met
            self._file.close()


@dataclass(frozen=True)
class RowHistory:
    """What a run folder tells of its rows."""

    run: Path
    digests: np.ndarray  # (rows,) uint64, memory-mapped
    rows_per_step: int
    # Of metrics.jsonl, one entry per training step in it; the first is past 1 where the run went on from another one.
    logged_steps: np.ndarray  # (steps,) int64
    rows_after_step: np.ndarray  # (steps,) int64, consumed up to the step's end
    chain: str  # the last data/ledger; "" where none is logged
    metrics_damage: str | None = None  # where metrics.jsonl cannot be read

    def locate_row(self, position: int) -> tuple[int, int]:
        """(step, row within the step), both from 1, of a position. A step with skipped updates has more than B rows."""
        num_ended = int(np.searchsorted(self.rows_after_step, position, side="right"))  # logged steps before it
        step = int(self.logged_steps[num_ended - 1]) if num_ended else 0
        rows = int(self.rows_after_step[num_ended - 1]) if num_ended else 0
        more = (position - rows) // self.rows_per_step
        if num_ended < len(self.logged_steps):  # all rows up to the end of the next logged step are of that one
            more = min(more, int(self.logged_steps[num_ended]) - step - 1)
        return step + more + 1, position - rows - more * self.rows_per_step + 1

    def step_of_row_count(self, num_rows: int) -> int:
        """The step of the last one of so many rows."""
        return self.locate_row(num_rows - 1)[0]

    def allows_checkpoint(self, step: int, num_rows: int) -> bool:
        """Whether metrics.jsonl allows that so many rows were consumed when a step's checkpoint was saved.

        Rows that skipped updates consume after a step are those of the next one.
        """
        before = self.rows_after_step[self.logged_steps == step]
        after = self.rows_after_step[self.logged_steps == step + 1]
        return not (len(before) and num_rows < before[-1]) and not (len(after) and num_rows >= after[-1])

    def chain_after(self, num_rows: int) -> str | None:
        """The hash chain after so many rows; None where the ledger has fewer, or has lost one of them."""
        digests = self.digests[:num_rows]
        if len(digests) < num_rows or not digests.all():
            return None
        return _hash_chain(digests, self.rows_per_step)

    def find_mismatch(self) -> str | None:
        """How ledger.bin differs from what metrics.jsonl tells; None if it does not.

        A run that lives, or was killed, may have more rows than its metrics: it writes them first.
        """
        path = self.run / LEDGER_FILE
        num_lost = int((self.digests == 0).sum())
        if num_lost:
            return f"{path} has lost the digests of {num_lost:,} rows"
        num_logged = int(self.rows_after_step[-1]) if len(self.rows_after_step) else 0
        own = self.chain_after(num_logged)
        chain = self.chain or EMPTY_LEDGER
        if own == chain:
            return None
        saw = f"ledger {own[:16]}" if own else f"{len(self.digests):,} rows"
        return f"{path} is not what its metrics say: {saw}, not {chain[:16]} after {num_logged:,} rows"

    def __str__(self) -> str:
        num = len(self.digests)
        chain = self.chain[:16] if self.chain else "not logged"
        return f"{self.run}: {num:,} rows (steps 1 to {self.step_of_row_count(num)}), ledger {chain}"


@dataclass(frozen=True)
class LedgerComparison:
    """Two histories, side by side over the rows that both have."""

    ours: RowHistory
    theirs: RowHistory
    common_rows: int  # rows that both have
    uncompared_rows: int  # of these, whose digest one of them has lost
    diverges_at: int | None  # the first position with another row

    def __str__(self) -> str:
        lines = []
        if self.ours.rows_per_step != self.theirs.rows_per_step:
            per_step = self._describe_both(lambda history: f"{history.rows_per_step} rows")
            lines.append(f"a step is {per_step}: rows are compared by their position in the run")
        lost = f", but for {self.uncompared_rows:,} that are lost" if self.uncompared_rows else ""
        position = self.diverges_at
        if position is not None:
            place = self._describe_both(lambda history: "row {1} of step {0}".format(*history.locate_row(position)))
            before = f"the same {position:,} rows{lost}, then they part" if position else "they part at once"
            lines.append(f"{before}: at {place} (position {position:,})")
            for history in (self.ours, self.theirs):
                lines.append(f"{history.run}: its digest is {int(history.digests[position]):016x}")
            return "\n".join(lines)
        steps = self._describe_both(lambda history: f"steps 1 to {history.step_of_row_count(self.common_rows)}")
        lines.append(f"the same {self.common_rows:,} rows{lost}: {steps}")
        longer = max(self.ours, self.theirs, key=lambda history: len(history.digests))
        num_rows = len(longer.digests)
        if num_rows > self.common_rows:
            more = num_rows - self.common_rows
            lines.append(f"{longer.run} has {more:,} more, to step {longer.step_of_row_count(num_rows)}")
        return "\n".join(lines)

    def _describe_both(self, describe: Callable[[RowHistory], str]) -> str:
        """What there is to say of either history; once where it is the same."""
        ours = describe(self.ours)
        theirs = describe(self.theirs)
        return ours if ours == theirs else f"{ours} of {self.ours.run}, {theirs} of {self.theirs.run}"


def read_row_history(run: Path) -> RowHistory:
    """The history of a run folder. Errors: UserError if it has trained no row yet, or is not one the run wrote."""
    # The metrics first: a run that lives appends to the ledger before it does to them.
    damage: list[str] = []
    steps = array("q")
    rows = array("q")
    chain = ""
    for line in read_jsonl(run / METRICS_FILE, say=damage.append):
        if "data/rows" in line:
            steps.append(line["step"])
            rows.append(line["data/rows"])
            chain = line["data/ledger"]
    return open_row_history(run, np.array(steps), np.array(rows), chain, damage[0] if damage else None)


def open_row_history(
    run: Path, logged_steps: np.ndarray, rows_after_step: np.ndarray, chain: str, metrics_damage: str | None
) -> RowHistory:
    """The ledger beside what was read of the metrics before. Errors: those of `read_row_history`."""
    path = run / LEDGER_FILE
    num_rows = path.stat().st_size // DIGEST_DTYPE.itemsize if path.is_file() else 0
    if not num_rows:
        saw = f"no row in {path}" if path.is_file() else f"no {LEDGER_FILE} in {run}"
        raise UserError(Problem("there are no rows to verify", saw, "a run that trained a step", "the RUN argument"))
    return RowHistory(
        run=run,
        digests=np.memmap(path, DIGEST_DTYPE, "r", shape=(num_rows,)),
        rows_per_step=read_provenance(run / "config.yaml")["rows_per_step"],
        logged_steps=logged_steps.astype(np.int64),
        rows_after_step=rows_after_step.astype(np.int64),
        chain=chain,
        metrics_damage=metrics_damage,
    )


def compare_row_histories(ours: RowHistory, theirs: RowHistory) -> LedgerComparison:
    """The first position at which two runs trained on different rows, up to the end of the shorter one."""
    common = min(len(ours.digests), len(theirs.digests))
    lost = 0
    for start in range(0, common, COMPARE_CHUNK):
        stop = min(start + COMPARE_CHUNK, common)
        a = ours.digests[start:stop]
        b = theirs.digests[start:stop]
        known = (a != 0) & (b != 0)
        differing = np.flatnonzero(known & (a != b))
        if len(differing):
            return LedgerComparison(ours, theirs, common, lost, diverges_at=start + int(differing[0]))
        lost += len(known) - int(known.sum())
    return LedgerComparison(ours, theirs, common, lost, diverges_at=None)


def verify_ledgers(runs: Sequence[Path]) -> bool:
    """Whether the ledger of each run is what its metrics say, and two runs trained on the same rows; prints the facts.

    Errors: those of `read_row_history`.
    """
    histories = [read_row_history(run) for run in runs]
    faults = [fault for history in histories for fault in (history.find_mismatch(), history.metrics_damage) if fault]
    comparisons = [compare_row_histories(ours, theirs) for ours, theirs in itertools.pairwise(histories)]
    print(*histories, *faults, *comparisons, sep="\n")
    return not faults and all(comparison.diverges_at is None for comparison in comparisons)


def _hash_chain(digests: np.ndarray, rows_per_step: int) -> str:
    """The ledger's hash chain after these rows (order.extend_ledger), B of them at a time."""
    ledger = EMPTY_LEDGER
    for start in range(0, len(digests), rows_per_step):
        ledger = extend_ledger(ledger, int(digests[start : start + rows_per_step].sum(dtype=np.uint64)))
    return ledger
