"""Rows by (source, place): out of tokens that lie ready (CachedRows), or of streams that are read now (StreamedRows).

Suffixes of names are shapes: n rows, T targets per row.
"""

import functools
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from smoltrain.data.documents.retry import ReaderHealth
from smoltrain.data.order import permute_places
from smoltrain.data.rows.row_contents import Passage, document_spans
from smoltrain.data.rows.streams import RowStream, StreamCursor, StreamedSource, StreamPosition
from smoltrain.data.tokens.packing import count_rows
from smoltrain.data.tokens.token_files import MappedTokens

CHUNK = 2048  # places whose rows are looked up at once
SOURCE_BITS, STREAM_BITS = 56, 40  # where in a row's 64-bit number its source, and its stream, begin


@dataclass(frozen=True)
class RowRequest:
    """Which rows: of which source (n,), its how manieth row (n,), and the stream (n,) whose turn it is."""

    source: np.ndarray
    place: np.ndarray
    stream: np.ndarray

    @functools.cached_property
    def by_stream(self) -> list[tuple[tuple[int, int], np.ndarray]]:
        """((source, stream), which of the rows are its next ones, in order)."""
        keys = self.source << SOURCE_BITS | self.stream
        return [
            ((int(key) >> SOURCE_BITS, int(key) & (2**SOURCE_BITS - 1)), np.flatnonzero(keys == key))
            for key in np.unique(keys)
        ]


@dataclass(frozen=True)
class FetchedRows:
    """Token ids (n, T + 1), and what the counters want to know."""

    ids: np.ndarray
    row_ids: np.ndarray  # (n,) which rows of all data they are
    num_new_rows: int  # none of whose tokens was seen before
    num_new_documents: int  # that begin in these rows, in their source's first epoch
    documents: np.ndarray  # content hashes (uint64) of all that begin in these rows


class RowSource(ABC):
    """Where a rank's rows come from. Asking twice gives the same rows, until they are `consumed`."""

    @abstractmethod
    def wait_until_ready(self, wanted: RowRequest, timeout_s: float) -> bool:
        """Whether `rows` can answer at once, after at most so long. Errors: UserError if they cannot be had."""

    @abstractmethod
    def rows(self, wanted: RowRequest) -> FetchedRows:
        """The rows; waits for them. Errors: as `ready`."""

    @abstractmethod
    def passages(self, wanted: RowRequest) -> list[list[Passage]]:
        """The documents of each of these rows (n,), in order, as far as they are known without reading anything."""

    @abstractmethod
    def mark_consumed(self, wanted: RowRequest) -> None:
        """The optimizer has used them."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What this rank alone knows; the union over the ranks is the whole, and any rank can load it. JSON-able."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the union of all ranks' states."""

    @property
    def num_bad_records(self) -> int:
        """Records of this rank's streams that were skipped so far."""
        return 0

    def close(self) -> None:  # noqa: B027 -- most have nothing to close
        """No more rows are wanted."""


class CachedRowSource(RowSource):
    """A true permutation of all rows of a source each epoch. Needs no state: a place says it all."""

    def __init__(self, tokens: tuple[MappedTokens, ...], sequence_length: int, seed: int) -> None:
        self._tokens, self._sequence_length, self._seed = tokens, sequence_length, seed
        self.num_rows = [count_rows(len(t), sequence_length) for t in tokens]
        self._chunks: dict[int, tuple[int, np.ndarray]] = {}

    def wait_until_ready(self, wanted: RowRequest, timeout_s: float) -> bool:  # noqa: ARG002
        """At once."""
        return True

    def rows(self, wanted: RowRequest) -> FetchedRows:
        """See Supply."""
        T, parts = self._sequence_length, []
        for source, (tokens, num_rows) in enumerate(zip(self._tokens, self.num_rows, strict=True)):
            here = np.flatnonzero(wanted.source == source)
            if not len(here):
                continue
            places = wanted.place[here]
            rows = self._rows_at_places(source, num_rows, places)
            begins = (rows * T).astype(tokens.starts.dtype)  # of another type all starts would be converted
            first, last = np.searchsorted(tokens.starts, np.stack([begins, begins + tokens.starts.dtype.type(T)]))
            begun = np.concatenate([tokens.hashes[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)])
            new = places < num_rows
            counts = int(new.sum()), int((last - first)[new].sum())
            parts.append((here, tokens.rows(rows * T, T + 1), rows | source << SOURCE_BITS, counts, begun))
        if len(parts) == 1:
            _, ids, row_ids, (new_rows, new_documents), begun = parts[0]
            return FetchedRows(ids, row_ids, new_rows, new_documents, begun)
        back = np.argsort(np.concatenate([here for here, *_ in parts]))
        return FetchedRows(
            np.concatenate([ids for _, ids, *_ in parts])[back],
            np.concatenate([row_ids for _, _, row_ids, *_ in parts])[back],
            sum(counts[0] for *_, counts, _ in parts),
            sum(counts[1] for *_, counts, _ in parts),
            np.concatenate([begun for *_, begun in parts]),
        )

    def passages(self, wanted: RowRequest) -> list[list[Passage]]:
        """Documents are known by their numbers; see passages.located."""
        T, found = self._sequence_length, []
        for source, place in zip(wanted.source.tolist(), wanted.place, strict=True):
            starts = self._tokens[source].starts
            begin = int(self._rows_at_places(source, self.num_rows[source], np.array([place]))[0]) * T
            found.append(
                [Passage(first, last, number=number) for number, first, last in document_spans(starts, begin, T)]
            )
        return found

    def _rows_at_places(self, source: int, num_rows: int, places: np.ndarray) -> np.ndarray:
        """The rows (n,) at these ascending places (n,) of a source's endless sequence."""
        rows = np.empty(len(places), np.int64)
        done = 0
        while done < len(places):
            chunk = int(places[done]) // CHUNK
            end = int(np.searchsorted(places, (chunk + 1) * CHUNK))
            rows[done:end] = self._shuffled_chunk(source, num_rows, chunk)[places[done:end] - chunk * CHUNK]
            done = end
        return rows

    def _shuffled_chunk(self, source: int, num_rows: int, chunk: int) -> np.ndarray:
        """The rows (CHUNK,) at the places from chunk * CHUNK on; the last chunk of each source is kept."""
        known, rows = self._chunks.get(source, (-1, np.empty(0, np.int64)))
        if known != chunk:
            epochs, places = np.divmod(np.arange(chunk * CHUNK, (chunk + 1) * CHUNK), num_rows)
            rows = np.empty(CHUNK, np.int64)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                rows[epochs == epoch] = permute_places(places[epochs == epoch], num_rows, self._seed, source, epoch)
            self._chunks[source] = (chunk, rows)
        return rows

    def mark_consumed(self, wanted: RowRequest) -> None:
        """Nothing to remember."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class StreamedRowSource(RowSource):
    """The streams of all sources that one rank reads: those whose number it is modulo the world."""

    def __init__(self, sources: tuple[StreamedSource, ...], rank: int, world_size: int, health: ReaderHealth) -> None:
        self._sources, self._rank, self._world_size, self._health = sources, rank, world_size, health
        mine = [(s.number, v) for s in sources for v in range(rank, s.num_streams, world_size)]
        self._pool = ThreadPoolExecutor(len(mine), "data")
        self._streams: dict[tuple[int, int], RowStream] = {}
        self._places = dict.fromkeys(mine, StreamPosition())

    def _open_row_stream(self, key: tuple[int, int]) -> RowStream:
        """Begun when it is first asked for: a source that the mix leaves out is not read."""
        if key not in self._streams:
            source, number = key
            self._streams[key] = RowStream(self._sources[source], number, self._places[key], self._health, self._pool)
        return self._streams[key]

    def wait_until_ready(self, wanted: RowRequest, timeout_s: float) -> bool:
        """See Supply."""

        def missing() -> list[Future]:
            asked = [self._open_row_stream(key).pending_block(len(here)) for key, here in wanted.by_stream]
            return [future for future in asked if future is not None]

        if not (futures := missing()):
            return True
        wait(futures, timeout_s)
        return not missing()

    def rows(self, wanted: RowRequest) -> FetchedRows:
        """See Supply."""
        ids: list[Any] = [None] * len(wanted.source)
        row_ids = np.empty(len(ids), np.int64)
        num_new_rows = num_new_documents = 0
        begun = []
        for (source, stream), here in wanted.by_stream:
            for i, (block, place) in zip(here, self._open_row_stream((source, stream)).rows(len(here)), strict=True):
                ids[i] = block.ids[place]
                row_ids[i] = block.rows[place] | source << SOURCE_BITS | stream << STREAM_BITS
                num_new_rows += int(block.first_epoch[place])
                num_new_documents += int(block.new_documents[place])
                begun.append(block.documents[place])
        return FetchedRows(np.stack(ids), row_ids, num_new_rows, num_new_documents, np.concatenate(begun))

    def passages(self, wanted: RowRequest) -> list[list[Passage]]:
        """See Supply."""
        found: list[Any] = [None] * len(wanted.source)
        for key, here in wanted.by_stream:
            for i, (block, place) in zip(here, self._open_row_stream(key).rows(len(here)), strict=True):
                found[i] = block.passages(place)
        return found

    def mark_consumed(self, wanted: RowRequest) -> None:
        """See Supply."""
        for key, here in wanted.by_stream:
            self._streams[key].mark_consumed(len(here))

    @property
    def num_bad_records(self) -> int:
        """See Supply."""
        begun = self._streams
        return sum(begun[k].num_bad if k in begun else place.block_begins.num_bad for k, place in self._places.items())

    def state(self) -> dict[str, Any]:
        """{"SOURCE/STREAM": [number of consumed rows, cursor]}."""
        places = {k: self._streams[k].place if k in self._streams else place for k, place in self._places.items()}
        return {
            f"{source}/{stream}": [place.num_rows, *place.block_begins] for (source, stream), place in places.items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """See Supply."""
        if self._streams:  # the run goes back: what they are reading now is no longer wanted
            self.close()
            self._streams, self._pool = {}, ThreadPoolExecutor(len(self._places), "data")
        for source, stream in self._places:
            num_rows, *cursor = state[f"{source}/{stream}"]
            self._places[source, stream] = StreamPosition(StreamCursor(*cursor), num_rows)

    def close(self) -> None:
        """See Supply."""
        self._pool.shutdown(wait=False, cancel_futures=True)
