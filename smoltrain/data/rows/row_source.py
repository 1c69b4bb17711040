"""Rows by (source, place): out of tokens that lie ready (CachedRowSource), or of streams that are read while training
(StreamedRowSource).

Suffixes of names are shapes: n rows, T targets per row.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.order import permute_places
from smoltrain.data.rows.row_contents import Passage, document_spans
from smoltrain.data.rows.streams import RowStream, ShuffleBlock, StreamCursor, StreamedSource, StreamPosition
from smoltrain.data.tokens.packing import count_rows
from smoltrain.data.tokens.token_files import MappedTokens

CHUNK = 2048  # places whose rows are looked up at once
SOURCE_BITS, STREAM_BITS = 56, 40  # where in a row's 64-bit number its source, and its stream, begin
StreamKey = tuple[int, int]  # source, stream


@dataclass(frozen=True)
class RowRequest:
    """Which rows: their sources (n,), their places (n,) in the endless sequences of these, and the streams (n,) whose
    turn it is.
    """

    source: np.ndarray
    place: np.ndarray
    stream: np.ndarray

    @functools.cached_property
    def by_stream(self) -> list[tuple[StreamKey, np.ndarray]]:
        """((source, stream), which of the rows are its next ones, in order)."""
        keys = np.stack([self.source, self.stream], axis=1)
        return [
            ((int(source), int(stream)), np.flatnonzero((keys == (source, stream)).all(axis=1)))
            for source, stream in np.unique(keys, axis=0)
        ]


@dataclass(frozen=True)
class FetchedRows:
    """Token ids (n, T + 1), and what the counters want to know."""

    ids: np.ndarray
    row_ids: np.ndarray  # (n,) which rows of all data they are
    num_new_rows: int  # none of whose tokens was seen before
    num_new_documents: int  # that begin in these rows, in their source's first epoch


class RowSource(ABC):
    """Where a rank's rows come from. Asking twice gives the same rows, until they are marked as consumed.

    What is not abstract here suits rows that lie ready: there is nothing to wait for, to remember or to close.
    """

    @abstractmethod
    def rows(self, wanted: RowRequest) -> FetchedRows:
        """The rows; waits for them. Errors: as `wait_until_ready`."""

    @abstractmethod
    def passages(self, wanted: RowRequest) -> list[list[Passage]]:
        """The documents of each of these rows (n,), in order."""

    def hold_passages(self, wanted: RowRequest) -> Callable[[], list[list[Passage]]]:
        """What finds `passages`, now or when other rows have been taken: a place says it all."""
        return lambda: self.passages(wanted)

    def wait_until_ready(self, wanted: RowRequest, timeout_s: float) -> bool:  # noqa: ARG002
        """Whether `rows` can answer at once, after at most so long. Errors: UserError if they cannot be had."""
        return True

    def mark_consumed(self, wanted: RowRequest) -> None:  # noqa: B027
        """The optimizer has used them."""

    def state(self) -> dict[str, Any]:
        """What this rank alone knows; the union over the ranks is the whole, and any rank can load it. JSON-able."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Continue from the union of all ranks' states."""

    @property
    def num_bad_records(self) -> int:
        """Records of this rank's streams that were skipped so far."""
        return 0

    def close(self) -> None:  # noqa: B027
        """No more rows are wanted."""


class CachedRowSource(RowSource):
    """A true permutation of all rows of a source each epoch. Needs no state: a place says it all."""

    def __init__(self, tokens: tuple[MappedTokens, ...], sequence_length: int, seed: int) -> None:
        self._tokens, self._sequence_length, self._seed = tokens, sequence_length, seed
        self.num_rows = [count_rows(len(t), sequence_length) for t in tokens]
        self._chunks: dict[int, tuple[int, np.ndarray]] = {}

    @override
    def rows(self, wanted: RowRequest) -> FetchedRows:
        T = self._sequence_length
        ids = np.empty((len(wanted.source), T + 1), np.result_type(*(tokens.dtype for tokens in self._tokens)))
        row_ids = np.empty(len(wanted.source), np.int64)
        num_new_rows = num_new_documents = 0
        for source in np.unique(wanted.source).tolist():
            tokens, num_rows = self._tokens[source], self.num_rows[source]
            own = wanted.source == source
            places = wanted.place[own]
            rows = self._rows_at_places(source, places)
            ids[own] = tokens.read_rows(rows * T, T + 1)
            row_ids[own] = rows | source << SOURCE_BITS
            new_rows = rows[places < num_rows]  # those of the source's first epoch
            num_new_rows += len(new_rows)
            num_new_documents += _count_documents(tokens.starts, new_rows * T, T)
        return FetchedRows(ids, row_ids, num_new_rows, num_new_documents)

    @override
    def passages(self, wanted: RowRequest) -> list[list[Passage]]:
        T, passages = self._sequence_length, []
        for source, place in zip(wanted.source.tolist(), wanted.place, strict=True):
            tokens = self._tokens[source]
            (row,) = self._rows_at_places(source, np.array([place]))
            spans = document_spans(tokens.starts, int(row) * T, T)
            passages.append(
                [Passage(first, last, tokens.document_address(number), number) for number, first, last in spans]
            )
        return passages

    def _rows_at_places(self, source: int, places: np.ndarray) -> np.ndarray:
        """The rows (n,) at these ascending places (n,) of a source's endless sequence."""
        rows = np.empty(len(places), np.int64)
        done = 0
        while done < len(places):
            chunk = int(places[done]) // CHUNK
            end = int(np.searchsorted(places, (chunk + 1) * CHUNK))
            rows[done:end] = self._shuffled_chunk(source, chunk)[places[done:end] - chunk * CHUNK]
            done = end
        return rows

    def _shuffled_chunk(self, source: int, chunk: int) -> np.ndarray:
        """The rows (CHUNK,) at the places from chunk * CHUNK on; the last chunk of each source is kept."""
        known, rows = self._chunks.get(source, (-1, np.empty(0, np.int64)))
        if known != chunk:
            num_rows = self.num_rows[source]
            epochs, places = np.divmod(np.arange(chunk * CHUNK, (chunk + 1) * CHUNK), num_rows)
            rows = np.empty(CHUNK, np.int64)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                own = epochs == epoch
                rows[own] = permute_places(places[own], num_rows, self._seed, source, epoch)
            self._chunks[source] = (chunk, rows)
        return rows


def _count_documents(starts: np.ndarray, begins: np.ndarray, length: int) -> int:
    """How many documents begin in the `length` tokens from each of these places (n,) on."""
    begins = begins.astype(starts.dtype)  # with needles of another type numpy would convert all starts
    first, last = np.searchsorted(starts, np.stack([begins, begins + starts.dtype.type(length)]))
    return int((last - first).sum())


class StreamedRowSource(RowSource):
    """The streams of all sources that one rank reads: those whose number modulo the world size is its own."""

    def __init__(self, sources: tuple[StreamedSource, ...], rank: int, world_size: int, health: ReaderHealth) -> None:
        self._sources, self._health = sources, health
        own = [(source.number, v) for source in sources for v in range(rank, source.num_streams, world_size)]
        self._pool = ThreadPoolExecutor(len(own), "data")
        self._streams: dict[StreamKey, RowStream] = {}  # those that were begun
        self._positions = dict.fromkeys(own, StreamPosition())  # where the others begin

    @override
    def wait_until_ready(self, wanted: RowRequest, timeout_s: float) -> bool:
        if pending := self._pending_blocks(wanted):
            wait(pending, timeout_s)
        return not self._pending_blocks(wanted)

    @override
    def rows(self, wanted: RowRequest) -> FetchedRows:
        ids: list[Any] = [None] * len(wanted.source)
        row_ids = np.empty(len(ids), np.int64)
        num_new_rows = num_new_documents = 0
        for (source, stream), own in wanted.by_stream:
            fetched = self._open_row_stream((source, stream)).rows(len(own))
            for i, (block, row) in zip(own, fetched, strict=True):
                ids[i] = block.ids[row]
                row_ids[i] = block.rows[row] | source << SOURCE_BITS | stream << STREAM_BITS
                num_new_rows += int(block.first_epoch[row])
                num_new_documents += int(block.new_documents[row])
        return FetchedRows(np.stack(ids), row_ids, num_new_rows, num_new_documents)

    @override
    def passages(self, wanted: RowRequest) -> list[list[Passage]]:
        return self.hold_passages(wanted)()

    @override
    def hold_passages(self, wanted: RowRequest) -> Callable[[], list[list[Passage]]]:
        held: list[tuple[int, ShuffleBlock, int]] = []
        for key, own in wanted.by_stream:
            for i, (block, row) in zip(own, self._open_row_stream(key).rows(len(own)), strict=True):
                held.append((int(i), block, row))

        def find_passages() -> list[list[Passage]]:
            passages: list[list[Passage]] = [[]] * len(wanted.source)
            for i, block, row in held:
                passages[i] = block.passages(row)
            return passages

        return find_passages

    @override
    def mark_consumed(self, wanted: RowRequest) -> None:
        for key, own in wanted.by_stream:
            self._streams[key].mark_consumed(len(own))

    @property
    @override
    def num_bad_records(self) -> int:
        begun = sum(stream.num_bad for stream in self._streams.values())
        others = sum(p.block_begins.num_bad for key, p in self._positions.items() if key not in self._streams)
        return begun + others

    @override
    def state(self) -> dict[str, Any]:
        """{"SOURCE/STREAM": [number of consumed rows, *cursor]}."""
        positions = self._positions | {key: stream.position for key, stream in self._streams.items()}
        return {f"{source}/{stream}": [at.num_rows, *at.block_begins] for (source, stream), at in positions.items()}

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        if self._streams:  # the run goes back: what they are reading now is no longer wanted
            self.close()
            self._streams, self._pool = {}, ThreadPoolExecutor(len(self._positions), "data")
        for source, stream in self._positions:
            num_rows, *cursor = state[f"{source}/{stream}"]
            self._positions[source, stream] = StreamPosition(StreamCursor(*cursor), num_rows)

    @override
    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open_row_stream(self, key: StreamKey) -> RowStream:
        """Begun when it is first asked for: a source that the mix leaves out is not read."""
        if key not in self._streams:
            source, number = key
            self._streams[key] = RowStream(
                self._sources[source], number, self._positions[key], self._health, self._pool
            )
        return self._streams[key]

    def _pending_blocks(self, wanted: RowRequest) -> list[Future]:
        """The blocks to wait for before `rows` can answer."""
        blocks = [self._open_row_stream(key).pending_block(len(own)) for key, own in wanted.by_stream]
        return [block for block in blocks if block is not None]
