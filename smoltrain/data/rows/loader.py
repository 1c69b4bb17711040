"""The rows of each step for one rank, as tensors; a position and a ledger that any world size can resume from.

Suffixes of names are shapes: B rows, T targets per row, S = T + 1 ids.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from smoltrain.data.documents.retry import ReaderHealth
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
from smoltrain.data.rows.count_distinct import DistinctCounter
from smoltrain.data.rows.row_contents import NUM_SHOWN_TOKENS, RowContents
from smoltrain.data.rows.row_source import RowRequest, RowSource
from smoltrain.data.tokens.packing import NO_LABEL, count_rows, inputs_and_labels, positions_in_documents
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.errors import Problem, UserError

LOADER_STATE_FORMAT = 2


@dataclass(frozen=True)
class Batch:
    """One micro-batch: ids int64 (B, T), and labels int64 (B, T), already one place on; -100 is no target.

    With a document mask also positions int64 (B, T): each token's place in its document, 0 where one begins.
    """

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor | None = None

    def slice_rows(self, first: int, last: int) -> "Batch":
        """Its rows from `first` up to, but without, `last`; not copied."""
        positions_BT = None if self.positions_BT is None else self.positions_BT[first:last]
        return Batch(self.ids_BT[first:last], self.labels_BT[first:last], positions_BT)

    def to(self, device: torch.device) -> "Batch":
        """The same on this device. The host does not wait for a GPU, which only pinned memory allows."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        positions_BT = None if self.positions_BT is None else moved(self.positions_BT)
        return Batch(moved(self.ids_BT), moved(self.labels_BT), positions_BT)


@dataclass(frozen=True)
class StepRows:
    """One rank's part of one step. `counts` are to be summed over the ranks (as int64, wrapping) and given back."""

    micro_batches: list[Batch]
    counts: list[int]


@dataclass(frozen=True)
class StepTotals:
    """What all ranks together took in a step."""

    targets: list[int]  # valid labels, by source
    num_new_rows: int
    num_new_documents: int
    num_bad_records: int  # so far
    digests: np.ndarray  # (rows_per_step,) uint64, by position

    @property
    def num_targets(self) -> int:
        """Valid labels of the step."""
        return sum(self.targets)


@dataclass(frozen=True)
class StepLayout:
    """How a step's rows are cut up."""

    sequence_length: int
    rows_per_step: int
    micro_batch: int
    accumulation: int
    rank: int = 0
    world_size: int = 1
    document_mask: bool = False


class Loader:
    """Deals the endless global sequence of rows (see order.py) to one rank.

    The protocol is `take`, train, `consumed`: the position moves only when the optimizer has used the rows, so a step
    that is tried again, or cut short by a crash, sees the same rows.
    """

    def __init__(
        self,
        prepared: PreparedData,
        supply: RowSource,
        shape: StepLayout,
        *,
        identity: dict[str, Any],
        weights: dict[str, float],
        health: ReaderHealth | None = None,
        locate: Callable[[list[RowContents]], list[RowContents]] = list,
    ) -> None:
        """`identity` is what the sequence is a function of; `weights` those of the sources, by name."""
        assert shape.rows_per_step == shape.micro_batch * shape.accumulation * shape.world_size
        assert 0 <= shape.rank < shape.world_size
        self.prepared, self.shape, self.health = prepared, shape, health or ReaderHealth()
        self.sources = tuple(weights)
        self.rows_consumed = 0
        self.ledger = EMPTY_LEDGER
        self.sketch = DistinctCounter()  # of this rank's documents since the last merge, and of all before
        self.source_rows = np.zeros(len(weights), np.int64)  # consumed so far, by source
        self.source_targets = [0] * len(weights)
        self.unique_rows = self.unique_documents = self.bad_records = 0
        self._supply, self._identity, self._locate = supply, identity, locate
        self._default = tuple(weights.values())
        self._weights, self._mix_begins = self._default, 0
        self._begun: np.ndarray | None = None  # content hashes of the documents in the rows last taken

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

    @property
    def mix_begins(self) -> int:
        """The position since which the sources have the shares that they have now."""
        return self._mix_begins

    def set_source_mix(self, weights: dict[str, float] | None) -> None:
        """From here on these shares, by source name; None is the sources' own. Said again it changes nothing."""
        new = self._default if weights is None else tuple(weights.get(name, 0.0) for name in self.sources)
        if new != self._weights:
            self._weights, self._mix_begins = new, self.rows_consumed
            self._clear_next()

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Whether `take` can answer at once, after at most so long. Errors: UserError if the data cannot be read."""
        return self._supply.wait_until_ready(self._next[0], timeout_s)

    def fetch_step_rows(self) -> StepRows:
        """The next step's rows for this rank; the same ones until `consumed` is called. Waits for them."""
        wanted, positions, _ = self._next
        rows = self._supply.rows(wanted)
        digests = np.zeros(self.shape.rows_per_step, np.int64)
        mine = hash_rows(positions, rows.row_ids, rows.ids)
        digests[positions - self.rows_consumed] = np.array(mine, np.uint64).view(np.int64)
        self._begun = rows.documents
        whole = self._make_batch(rows.ids)
        size = self.shape.micro_batch
        micro_batches = [whole.slice_rows(i, i + size) for i in range(0, len(rows.ids), size)]
        targets = np.bincount(wanted.source, minlength=len(self.sources)) * self.shape.sequence_length
        if self.shape.document_mask:
            targets -= np.bincount(wanted.source, (whole.labels_BT == NO_LABEL).sum(1), len(self.sources)).astype(int)
        more = [rows.num_new_rows, rows.num_new_documents, self._supply.num_bad_records]
        return StepRows(micro_batches, [*targets.tolist(), *more, *digests.tolist()])

    @property
    def num_counts(self) -> int:
        """How many counts the rows of a step have, on any rank."""
        return len(self.sources) + 3 + self.shape.rows_per_step

    def unpack_totals(self, counts: list[int]) -> StepTotals:
        """What the sums of all ranks' counts say."""
        num = len(self.sources)
        new_rows, new_documents, bad_records = counts[num : num + 3]
        digests = np.array(counts[num + 3 :], np.int64).view(np.uint64)
        return StepTotals(counts[:num], new_rows, new_documents, bad_records, digests)

    def describe_rows(self) -> list[RowContents]:
        """This rank's rows last taken, with what they hold, in the order of the micro-batches."""
        wanted, positions, _ = self._next
        ids, found = self._supply.rows(wanted).ids, self._supply.passages(wanted)
        decode = self.prepared.tokenizer.decode
        return [
            RowContents(
                int(position),
                self.sources[source],
                tuple(
                    replace(p, text=decode(row[p.first : min(p.last, p.first + NUM_SHOWN_TOKENS)].tolist()))
                    for p in held
                ),
            )
            for position, source, row, held in zip(positions, wanted.source.tolist(), ids, found, strict=True)
        ]

    def add_addresses(self, rows: list[RowContents]) -> list[RowContents]:
        """The same rows, of any rank, with the addresses of documents that can only be found by reading their files."""
        return self._locate(rows)

    def mark_consumed(self, totals: StepTotals) -> None:
        """The optimizer has used the rows last taken, on all ranks."""
        assert self._begun is not None, "consumed() without take(): a step would be skipped"
        wanted, _, by_source = self._next
        self._supply.mark_consumed(wanted)
        self.sketch.add(self._begun)
        self._begun = None
        self.source_rows += by_source
        self.rows_consumed += self.shape.rows_per_step
        self.source_targets = [a + b for a, b in zip(self.source_targets, totals.targets, strict=True)]
        self.unique_rows += totals.num_new_rows
        self.unique_documents += totals.num_new_documents
        self.bad_records = totals.num_bad_records
        self.ledger = extend_ledger(self.ledger, int(totals.digests.sum(dtype=np.uint64)))
        self._clear_next()

    def state(self) -> dict[str, Any]:
        """Where the run stands, JSON-able: this rank's part of it. `merged` makes it the same on every rank."""
        return {
            "format": LOADER_STATE_FORMAT,
            "position": self.rows_consumed,
            "ledger": self.ledger,
            "identity": self._identity,
            "weights": self._weights,
            "mix_begins": self._mix_begins,
            "source_rows": self.source_rows.tolist(),
            "source_targets": self.source_targets,
            "unique_rows": self.unique_rows,
            "unique_documents": self.unique_documents,
            "bad_records": self.bad_records,
            "sketch": self.sketch.to_text(),
            "streams": self._supply.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a merged state. Errors: UserError, one problem for each way in which it is of other data."""
        if state.get("format") != LOADER_STATE_FORMAT:
            what, want = "the checkpoint is of another sequence of rows: format", str(state.get("format"))
            change = "the version of smoltrain, to the one that wrote the checkpoint"
            raise UserError(Problem(what, str(LOADER_STATE_FORMAT), want, change))
        problems = [
            Problem(
                f"the checkpoint is of another sequence of rows: {key}",
                str(self._identity.get(key)),
                str(state["identity"].get(key)),
                "the recipe, back to what the run began with",
            )
            for key in self._identity | state["identity"]
            if self._identity.get(key) != state["identity"].get(key)
        ]
        if problems:
            raise UserError(*problems)
        self.rows_consumed, self.ledger = state["position"], state["ledger"]
        self._weights, self._mix_begins = tuple(state["weights"]), state["mix_begins"]
        self.source_rows = np.array(state["source_rows"], np.int64)
        self.source_targets = list(state["source_targets"])
        self.unique_rows, self.unique_documents = state["unique_rows"], state["unique_documents"]
        self.bad_records = state["bad_records"]
        self.sketch = DistinctCounter.from_text(state["sketch"])
        self._supply.load_state(state["streams"])
        self._begun = None
        self._clear_next()

    def validation_batches(self, num_rows: int) -> list[Batch]:
        """This rank's batches of at most `num_rows` held-out rows, evenly spaced; the same on any world, each time.

        Several sources share the rows by weight. Every rank gets the same number of full batches, for a forward under
        ZeRO-3 needs all ranks; rows that fill them up have no valid label.
        """
        shape, T = self.shape, self.shape.sequence_length
        rows = []
        counts = apportion_by_weight(max(num_rows, len(self.sources)), self._default)
        for tokens, count in zip(self.prepared.validation, counts, strict=True):
            chosen = evenly_spaced_rows(count, count_rows(len(tokens), T))
            rows.append(tokens.rows(np.array(chosen, np.int64) * T, T + 1))
        ids_BS = np.concatenate(rows)
        num_slots = math.ceil(math.ceil(len(ids_BS) / shape.world_size) / shape.micro_batch) * shape.micro_batch
        mine = ids_BS[shape.rank :: shape.world_size]
        filled = np.concatenate([mine, np.repeat(ids_BS[:1], num_slots - len(mine), 0)])
        batches = []
        for start in range(0, num_slots, shape.micro_batch):
            batch = self._make_batch(filled[start : start + shape.micro_batch])
            labels_BT = batch.labels_BT.clone()
            labels_BT[max(0, len(mine) - start) :] = NO_LABEL
            batches.append(replace(batch, labels_BT=labels_BT))
        return batches

    def close(self) -> None:
        """No more rows are wanted."""
        self.health.stop()
        self._supply.close()

    @functools.cached_property
    def _next(self) -> tuple[RowRequest, np.ndarray, np.ndarray]:
        """This rank's rows of the next step, their positions (n,), and how many all ranks take of each source."""
        positions = self.rows_consumed + np.arange(self.shape.rows_per_step)
        sources = mix_pattern(self._weights)[(positions - self._mix_begins) % MIX_WINDOW]
        places = self.source_rows[sources] + count_earlier_equals(sources)
        lanes = max(self.prepared.streams, self.shape.world_size)  # tokens that lie ready know no streams
        streams = streams_of_positions(positions, lanes)
        mine = streams % self.shape.world_size == self.shape.rank
        by_source = np.bincount(sources, minlength=len(self.sources))
        return RowRequest(sources[mine], places[mine], streams[mine]), positions[mine], by_source

    def _clear_next(self) -> None:
        self.__dict__.pop("_next", None)  # where functools keeps it

    def _make_batch(self, ids_BS: np.ndarray) -> Batch:
        inputs_BT, labels_BT = inputs_and_labels(ids_BS.astype(np.int64))
        positions_BT = None
        if self.shape.document_mask:
            separator_id = self.prepared.tokenizer.separator_id
            positions_BT = torch.from_numpy(positions_in_documents(inputs_BT, separator_id))
            labels_BT = np.where(inputs_BT == separator_id, NO_LABEL, labels_BT)  # the next document's first token
        return Batch(torch.from_numpy(inputs_BT), torch.from_numpy(labels_BT), positions_BT)


def merge_loader_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as the one that every rank can load."""
    sketch = DistinctCounter()
    for state in states:
        sketch.merge(DistinctCounter.from_text(state["sketch"]))
    streams = {key: place for state in states for key, place in state["streams"].items()}
    return states[0] | {"sketch": sketch.to_text(), "streams": streams}
