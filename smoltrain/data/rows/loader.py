"""The rows of each step for one rank, as tensors; a position and a ledger that any world size can resume from.

Suffixes of names are shapes: B rows, T targets per row, S = T + 1 ids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.order import (
    EMPTY_LEDGER,
    MIX_WINDOW,
    apportion_by_weight,
    count_earlier_equals,
    evenly_spaced_rows,
    extend_ledger,
    hash_rows,
    mix_pattern,
    streams_of_positions,
)
from smoltrain.data.rows.batch import Batch
from smoltrain.data.rows.row_contents import NUM_SHOWN_TOKENS, Passage, RowContents
from smoltrain.data.rows.row_source import FetchedRows, RowRequest, RowSource
from smoltrain.data.tokens.packing import count_rows
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.errors import Problem, UserError
from smoltrain.kernels.loss import IGNORE_INDEX

LOADER_STATE_FORMAT = 3
READABLE_STATE_FORMATS = (2, 3)  # 2 also has a "sketch", from which different texts were estimated
PLAIN_STATE = ("ledger", "mix_begins", "source_targets", "unique_rows", "unique_documents", "bad_records")  # attributes


@dataclass(frozen=True)
class StepRows:
    """One rank's part of one step. `counts` are to be summed over the ranks (as int64, wrapping) and given back."""

    micro_batches: list[Batch]
    counts: list[int]


@dataclass(frozen=True)
class StepTotals:
    """What was taken in a step: by one rank, or, of summed counts, by all of them."""

    targets: list[int]  # valid labels, by source
    num_new_rows: int
    num_new_documents: int
    num_bad_records: int  # so far
    digests: np.ndarray  # (rows_per_step,) uint64, by position; 0 where another rank has the row

    @property
    def num_targets(self) -> int:
        """Valid labels of the step."""
        return sum(self.targets)

    def to_ints(self) -> list[int]:
        """As one all-reduce of int64 takes them."""
        counts = [self.num_new_rows, self.num_new_documents, self.num_bad_records]
        return [*self.targets, *counts, *self.digests.view(np.int64).tolist()]

    @classmethod
    def from_ints(cls, ints: list[int], num_sources: int) -> "StepTotals":
        """The inverse."""
        num_new_rows, num_new_documents, num_bad_records = ints[num_sources : num_sources + 3]
        digests = np.array(ints[num_sources + 3 :], np.int64).view(np.uint64)
        return cls(ints[:num_sources], num_new_rows, num_new_documents, num_bad_records, digests)


@dataclass(frozen=True)
class StepLayout:
    """How a step's rows are cut up: into micro-batches of each rank, one after the other (gradient accumulation)."""

    sequence_length: int
    rows_per_step: int
    micro_batch: int
    accumulation: int
    rank: int = 0
    world_size: int = 1
    document_mask: bool = False


class PlannedStep(NamedTuple):
    """This rank's rows of a step, their positions (n,), and how many all ranks take of each source."""

    wanted: RowRequest
    positions: np.ndarray
    rows_by_source: np.ndarray


class Loader:
    """Deals the endless global sequence of rows (see order.py) to one rank.

    The protocol is `fetch_step_rows`, train, `mark_consumed`: the position moves only when the optimizer has used the
    rows, so a step that is tried again, or cut short by a crash, sees the same rows.
    """

    def __init__(
        self,
        prepared: PreparedData,
        row_source: RowSource,
        layout: StepLayout,
        *,
        identity: dict[str, Any],
        weights: dict[str, float],
        health: ReaderHealth | None = None,
    ) -> None:
        """`identity` is what the sequence is a function of; `weights` those of the sources, by name."""
        assert layout.rows_per_step == layout.micro_batch * layout.accumulation * layout.world_size
        assert 0 <= layout.rank < layout.world_size
        self.prepared, self.layout, self.health = prepared, layout, health or ReaderHealth()
        self.sources = tuple(weights)
        self.rows_consumed = 0
        self.ledger = EMPTY_LEDGER
        self.source_rows = np.zeros(len(weights), np.int64)  # consumed so far, by source
        self.source_targets = [0] * len(weights)
        self.unique_rows = self.unique_documents = self.bad_records = 0
        self._row_source, self._identity = row_source, identity
        self._default_weights = tuple(weights.values())
        self._weights = self._default_weights
        self.mix_begins = 0  # the position since which the sources have the shares that they have now
        self._planned: PlannedStep | None = None
        self._fetched: FetchedRows | None = None

    @property
    def epochs(self) -> float | None:
        """Rows consumed over the rows there are: known of a single source whose tokens lie ready."""
        match self._identity.get("num_rows"):
            case [num_rows]:
                return self.rows_consumed / num_rows
        return None

    @property
    def repeat_factor(self) -> float:
        """How often a row was used on average: rows over distinct rows."""
        return self.rows_consumed / max(1, self.unique_rows)

    @property
    def targets_consumed(self) -> int:
        """Targets that the optimizer has used, over all ranks."""
        return sum(self.source_targets)

    def set_source_mix(self, weights: dict[str, float] | None) -> None:
        """From here on these shares, by source name; None is the sources' own. The same ones again change nothing."""
        new = self._default_weights if weights is None else tuple(weights.get(name, 0.0) for name in self.sources)
        if new != self._weights:
            self._weights, self.mix_begins = new, self.rows_consumed
            self._planned = None

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Whether `fetch_step_rows` can answer at once, after at most so long.

        Errors: UserError if the data cannot be read.
        """
        return self._row_source.wait_until_ready(self._next.wanted, timeout_s)

    def fetch_step_rows(self) -> StepRows:
        """The next step's rows for this rank; the same ones until `mark_consumed` is called. Waits for them."""
        fetched = self._row_source.rows(self._next.wanted)
        whole = self._make_batch(fetched.ids)
        size = self.layout.micro_batch
        micro_batches = [whole.slice_rows(i, i + size) for i in range(0, len(fetched.ids), size)]
        own = StepTotals(
            self._count_targets(whole.labels_BT), fetched.num_new_rows, fetched.num_new_documents,
            self._row_source.num_bad_records, self._hash_own_rows(fetched),
        )  # fmt: skip
        self._fetched = fetched
        return StepRows(micro_batches, own.to_ints())

    @property
    def num_counts(self) -> int:
        """How many counts the rows of a step have, on any rank."""
        return len(self.sources) + 3 + self.layout.rows_per_step

    def unpack_totals(self, counts: list[int]) -> StepTotals:
        """What the sums of all ranks' counts say."""
        return StepTotals.from_ints(counts, len(self.sources))

    def hold_rows(self) -> Callable[[], list[RowContents]]:
        """What describes this rank's rows last taken, with what they hold, in the order of the micro-batches.

        To be called now or when others have been taken; only then there is work to do.
        """
        assert self._fetched is not None, "there are no rows to hold"
        ids = self._fetched.ids
        wanted, positions, _ = self._next
        find_passages = self._row_source.hold_passages(wanted)

        def describe_rows() -> list[RowContents]:
            rows = []
            for position, source, row, held in zip(positions, wanted.source, ids, find_passages(), strict=True):
                shown = tuple(self._add_text(passage, row) for passage in held)
                rows.append(RowContents(int(position), self.sources[source], shown))
            return rows

        return describe_rows

    def mark_consumed(self, totals: StepTotals) -> None:
        """The optimizer has used the rows last taken, on all ranks."""
        assert self._fetched is not None, "consumed without being fetched: a step would be skipped"
        wanted, _, rows_by_source = self._next
        self._row_source.mark_consumed(wanted)
        self.source_rows += rows_by_source
        self.rows_consumed += self.layout.rows_per_step
        self.source_targets = [a + b for a, b in zip(self.source_targets, totals.targets, strict=True)]
        self.unique_rows += totals.num_new_rows
        self.unique_documents += totals.num_new_documents
        self.bad_records = totals.num_bad_records
        self.ledger = extend_ledger(self.ledger, int(totals.digests.sum(dtype=np.uint64)))
        self._planned = None
        self._fetched = None

    def state(self) -> dict[str, Any]:
        """Where the run stands, JSON-able: this rank's part of it. See merge_loader_states."""
        return {
            "format": LOADER_STATE_FORMAT,
            "position": self.rows_consumed,
            "identity": self._identity,
            "weights": self._weights,
            "source_rows": self.source_rows.tolist(),
            "streams": self._row_source.state(),
            **{name: getattr(self, name) for name in PLAIN_STATE},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a merged state. Errors: UserError, one problem for each way in which it is of other data."""
        if state.get("format") not in READABLE_STATE_FORMATS:
            what, want = "the checkpoint is of another sequence of rows: format", str(state.get("format"))
            change = "the version of smoltrain, to the one that wrote the checkpoint"
            raise UserError(Problem(what, str(LOADER_STATE_FORMAT), want, change))
        problems = [
            Problem(
                what=f"the checkpoint is of another sequence of rows: {key}",
                saw=str(self._identity.get(key)),
                want=str(state["identity"].get(key)),
                change="the recipe, back to what the run began with",
            )
            for key in self._identity | state["identity"]
            if self._identity.get(key) != state["identity"].get(key)
        ]
        if problems:
            raise UserError(*problems)
        self.rows_consumed = state["position"]
        self._weights = tuple(state["weights"])
        self.source_rows = np.array(state["source_rows"], np.int64)
        for name in PLAIN_STATE:
            setattr(self, name, state[name])
        self._row_source.load_state(state["streams"])
        self._planned = None
        self._fetched = None

    def validation_batches(self, num_rows: int) -> list[Batch]:
        """This rank's batches of at most `num_rows` held-out rows, evenly spaced; the same on any world, each time.

        Several sources share the rows by weight. Every rank gets the same number of full batches, for a forward under
        ZeRO-3 needs all ranks; rows that fill them up have no valid label.
        """
        layout, T = self.layout, self.layout.sequence_length
        rows = []
        for tokens, chosen in zip(self.prepared.validation, self._choose_validation_rows(num_rows), strict=True):
            rows.append(tokens.read_rows(np.array(chosen, np.int64) * T, T + 1))
        ids_BS = np.concatenate(rows)
        num_per_rank = math.ceil(len(ids_BS) / layout.world_size)
        num_slots = math.ceil(num_per_rank / layout.micro_batch) * layout.micro_batch
        own = ids_BS[layout.rank :: layout.world_size]
        filled = np.concatenate([own, np.repeat(ids_BS[:1], num_slots - len(own), 0)])
        batches = []
        for start in range(0, num_slots, layout.micro_batch):
            batch = self._make_batch(filled[start : start + layout.micro_batch])
            batches.append(replace(batch, num_labelled=max(0, len(own) - start)))
        return batches

    def count_validation_rows(self, num_rows: int) -> int:
        """How many rows `validation_batches` finds where so many are asked for: the held-out text may have fewer."""
        return sum(map(len, self._choose_validation_rows(num_rows)))

    def _choose_validation_rows(self, num_rows: int) -> list[list[int]]:
        """Which rows of each source are evaluated."""
        counts = apportion_by_weight(max(num_rows, len(self.sources)), self._default_weights)
        chosen: list[list[int]] = []
        for tokens, count in zip(self.prepared.validation, counts, strict=True):
            chosen.append(evenly_spaced_rows(count, count_rows(len(tokens), self.layout.sequence_length)))
        return chosen

    def close(self) -> None:
        """No more rows are wanted."""
        self.health.stop()
        self._row_source.close()

    # ---- the next step

    @property
    def _next(self) -> PlannedStep:
        if self._planned is None:
            self._planned = self._plan_step()
        return self._planned

    def _plan_step(self) -> PlannedStep:
        positions = self.rows_consumed + np.arange(self.layout.rows_per_step)
        sources = mix_pattern(self._weights)[(positions - self.mix_begins) % MIX_WINDOW]
        places = self.source_rows[sources] + count_earlier_equals(sources)
        # Tokens that lie ready have one stream only: then the ranks themselves are the lanes.
        num_lanes = max(self.prepared.streams, self.layout.world_size)
        streams = streams_of_positions(positions, num_lanes)
        own = streams % self.layout.world_size == self.layout.rank
        rows_by_source = np.bincount(sources, minlength=len(self.sources))
        return PlannedStep(RowRequest(sources[own], places[own], streams[own]), positions[own], rows_by_source)

    def _count_targets(self, labels_BT: torch.Tensor) -> list[int]:
        """Valid labels of this rank's rows, by source."""
        targets_B = (labels_BT != IGNORE_INDEX).sum(1).numpy()
        targets = np.bincount(self._next.wanted.source, targets_B, len(self.sources))
        return targets.astype(int).tolist()

    def _hash_own_rows(self, fetched: FetchedRows) -> np.ndarray:
        """The digests (rows_per_step,) uint64 of a step, by position: those of this rank's rows, 0 for all others."""
        positions = self._next.positions
        digests = np.zeros(self.layout.rows_per_step, np.uint64)
        own = hash_rows(positions, fetched.row_ids, fetched.ids)
        digests[positions - self.rows_consumed] = np.array(own, np.uint64)
        return digests

    def _add_text(self, passage: Passage, ids: np.ndarray) -> Passage:
        shown = ids[passage.first : min(passage.last, passage.first + NUM_SHOWN_TOKENS)]
        return replace(passage, text=self.prepared.tokenizer.decode(shown.tolist()))

    def _make_batch(self, ids_BS: np.ndarray) -> Batch:
        separator_id = self.prepared.tokenizer.separator_id if self.layout.document_mask else None
        return Batch(torch.from_numpy(ids_BS.astype(np.int32)), separator_id)


def merge_loader_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as the one that every rank can load: they differ in their streams alone."""
    streams = {key: place for state in states for key, place in state["streams"].items()}
    return states[0] | {"streams": streams}
