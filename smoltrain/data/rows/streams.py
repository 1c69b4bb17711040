"""Documents read while training: V virtual streams per source, dealt to whatever ranks there are; each prefetches.

Stream v of a source reads the shards number v, v + V, v + 2V, ..., in another order each epoch, for ever; where there
are fewer shards than streams, every V-th document of all of them. Its documents become tokens, its tokens rows, and
each block of `shuffle_rows` rows is permuted. All of this is a function of (seed, source, stream, epoch, block), so a
stream can go on anywhere from a few integers, and no two streams ever share a document.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents import retry
from smoltrain.data.documents.bad_records import BAD_RECORD_KEYS, bad_record_limit
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.documents.listing import has_own_validation
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.documents.records import BadRecord, Document
from smoltrain.data.documents.shard import Shard
from smoltrain.data.order import permute_places
from smoltrain.data.rows.row_contents import Passage, document_spans
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import packing
from smoltrain.data.tokens.packing import encode_documents
from smoltrain.data.tokens.token_files import content_hash
from smoltrain.errors import Problem, UserError

CHARACTERS_PER_TOKEN = 4  # of most texts, about
SHARD_ORDER = 1  # what is shuffled: the part of a shuffle's key in which these two differ
ROW_ORDER = 2


class StreamCursor(NamedTuple):
    """A place in a stream: token number `offset` of a record of the `shard`-th shard of an epoch."""

    epoch: int = 0
    shard: int = 0
    record: int = 0
    offset: int = 0
    num_bad: int = 0  # bad records of the first epoch before it


class StreamPosition(NamedTuple):
    """Where a stream stands: the cursor at which its current block begins, and how many rows before are consumed."""

    block_begins: StreamCursor = StreamCursor()
    num_rows: int = 0


class DocumentTokens(NamedTuple):
    """Consecutive tokens of one document."""

    cursor: StreamCursor  # of the first of them
    name: str  # the document's
    ids: np.ndarray
    begins: bool  # the document begins here

    def drop_first(self, count: int) -> "DocumentTokens":
        """Without its first `count` tokens."""
        cursor = self.cursor._replace(offset=self.cursor.offset + count)
        return DocumentTokens(cursor, self.name, self.ids[count:], self.begins and not count)


@dataclass(frozen=True)
class ShuffleBlock:
    """K rows that are shuffled with each other, in their shuffled order."""

    end: StreamCursor  # where the next block begins
    ids: np.ndarray  # (K, T + 1)
    rows: np.ndarray  # (K,) their numbers in the stream
    first_epoch: np.ndarray  # (K,) bool: all of the row's tokens are seen for the first time
    new_documents: np.ndarray  # (K,) how many documents begin in the row, in their first epoch
    starts: np.ndarray  # (D,) where in the block, before its shuffle, its documents begin; the first one at 0
    names: list[str]  # (D,) theirs

    def passages(self, place: int) -> list[Passage]:
        """The documents in the row at this place."""
        T = self.ids.shape[1] - 1
        begin = int(self.rows[place]) % len(self.rows) * T
        return [Passage(first, last, self.names[i]) for i, first, last in document_spans(self.starts, begin, T)]


@dataclass(frozen=True)
class StreamedSource:
    """What the rows of all streams of a source are a function of."""

    number: int  # of the source
    section: MixedSource
    data: DataSection
    shards: tuple[Shard, ...]
    num_streams: int
    tokenizer: Tokenizer
    dtype: np.dtype
    sequence_length: int
    seed: int
    held_out: frozenset[int] = frozenset()  # content hashes of texts that are validated on, of any source


class RowStream:
    """One virtual stream: rows from a position on, the next block always prefetched on a thread of the pool."""

    def __init__(
        self,
        source: StreamedSource,
        number: int,
        position: StreamPosition,
        health: ReaderHealth,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._source, self._number, self._health, self._pool = source, number, health, pool
        self._position = position
        self._blocks: list[ShuffleBlock] = []
        self._making = self._generate_blocks(position.block_begins, position.num_rows // source.data.shuffle_rows)
        self._future: Future[ShuffleBlock] = pool.submit(next, self._making)

    @property
    def position(self) -> StreamPosition:
        """From where the rows not yet consumed can be made again."""
        return self._position

    @property
    def num_bad(self) -> int:
        """Bad records passed over in the first epoch, up to the end of the block that is being consumed."""
        return self._blocks[0].end.num_bad if self._blocks else self._position.block_begins.num_bad

    def pending_block(self, count: int) -> Future[ShuffleBlock] | None:
        """The block to wait for before `rows(count)` can answer at once; None if it can. Errors: those of reading."""
        while self._num_rows_ready() < count:
            if not self._future.done():
                return self._future
            self._blocks.append(self._future.result())
            self._future = self._pool.submit(next, self._making)
        return None

    def rows(self, count: int) -> list[tuple[ShuffleBlock, int]]:
        """The next rows that are not consumed: each a block and a place in it. Waits for them."""
        while (future := self.pending_block(count)) is not None:
            future.exception()  # waits; the next look at the future raises it
        size, first = self._source.data.shuffle_rows, self._num_rows_consumed_of_block()
        return [(self._blocks[i // size], i % size) for i in range(first, first + count)]

    def mark_consumed(self, count: int) -> None:
        """The optimizer has used the next `count` rows."""
        num_served = self._num_rows_consumed_of_block() + count
        begins = self._position.block_begins
        for _ in range(num_served // self._source.data.shuffle_rows):
            begins = self._blocks.pop(0).end
        self._position = StreamPosition(begins, self._position.num_rows + count)

    def _num_rows_consumed_of_block(self) -> int:
        return self._position.num_rows % self._source.data.shuffle_rows

    def _num_rows_ready(self) -> int:
        return len(self._blocks) * self._source.data.shuffle_rows - self._num_rows_consumed_of_block()

    # ---- on the pool's threads: records -> documents -> tokens -> blocks

    def _read_records(self, cursor: StreamCursor) -> Iterator[tuple[StreamCursor, Document | BadRecord]]:
        """The records of one epoch from a cursor on, each with its own cursor (without a count of bad ones)."""
        source = self._source
        shards = deal_shards(source.shards, self._number, source.num_streams)
        stride = 1 if len(source.shards) >= source.num_streams else source.num_streams
        key = (SHARD_ORDER, source.number, self._number, cursor.epoch)
        shard_order = permute_places(np.arange(len(shards)), len(shards), source.seed, *key)
        first = cursor.record
        for i in range(cursor.shard, len(shards)):
            shard, first_of_stream = shards[shard_order[i]]
            for item in retry.read_records_with_retry(
                shard, source.section, first=first or first_of_stream, stride=stride, data=source.data,
                health=self._health,
            ):  # fmt: skip
                yield StreamCursor(cursor.epoch, i, item.record), item
            first = 0

    def _read_documents(self, cursor: StreamCursor) -> Iterator[tuple[StreamCursor, Document]]:
        """Training documents from a cursor on, for ever, each with its cursor. Errors: UserError."""
        source = self._source
        share = 0.0 if has_own_validation(source.section) else source.data.validation_share
        num_bad, num_read = cursor.num_bad, 0
        has_documents = cursor != StreamCursor()  # in the middle of an epoch that is known
        while True:
            for at, item in self._read_records(cursor):
                num_read += at.epoch == 0
                if isinstance(item, BadRecord) and item.empty:
                    line = f"empty records are passed over; the first one: {item.place}"
                    self._health.add_note_once("empty", line)
                elif isinstance(item, BadRecord):
                    if at.epoch == 0:  # each is counted, and said, once
                        num_bad += 1
                        self._count_bad_record(item, num_bad, num_bad - cursor.num_bad, num_read)
                elif is_held_out(item.name, share):
                    continue
                elif source.held_out and content_hash(item.text) in source.held_out:
                    self._note_held_out(item.name)
                else:
                    has_documents = True
                    yield at._replace(num_bad=num_bad), item
            if not has_documents:
                raise _no_document_error(source, self._number)
            cursor, has_documents = StreamCursor(cursor.epoch + 1), False

    def _note_held_out(self, name: str) -> None:
        """Say once per source that documents equal to held-out texts are left out."""
        source = self._source.section.name
        line = f"documents of {source} are not trained on where their texts are held out; the first one: {name}"
        self._health.add_note_once(f"held out of {source}", line)

    def _count_bad_record(self, record: BadRecord, num_bad: int, num_lately: int, num_read: int) -> None:
        """Log a bad record, the num_bad-th of this stream, and the num_lately-th of so many read since it began here.

        Errors: UserError where they are too many: all of them for a number, those read here for a share.
        """
        self._health.add_note(f"a bad record is skipped: {record.place}: {record.why}")
        data = self._source.data
        count = num_lately if data.max_bad_records is None else num_bad
        if count > bad_record_limit(data, num_read):
            what = f"more than {count - 1} records of a stream are bad; the last one: {record.why}"
            want, change = "readable records, or a higher limit", f"{BAD_RECORD_KEYS}, or the data"
            raise UserError(Problem(what, record.place, want, change))

    def _tokenise_documents(self, cursor: StreamCursor) -> Iterator[DocumentTokens]:
        """Tokens from a cursor on, for ever, with their own cursors."""
        num_to_skip = cursor.offset  # tokens of the first document, which belong to the block before
        documents = (((at, document.name), document.text) for at, document in self._read_documents(cursor))
        block = self._source.data.shuffle_rows * self._source.sequence_length
        characters = min(CHARACTERS_PER_TOKEN * block, packing.ENCODE_CHARACTERS)
        for piece in encode_documents(documents, self._source.tokenizer, self._source.dtype, characters):
            at, name = piece.about
            tokens = DocumentTokens(at._replace(offset=piece.offset), name, piece.ids, piece.offset == 0)
            num_before = max(num_to_skip - piece.offset, 0)
            if num_before < len(piece.ids):
                num_to_skip = 0
                yield tokens.drop_first(num_before)

    def _generate_blocks(self, cursor: StreamCursor, number: int) -> Iterator[ShuffleBlock]:
        """Block `number`, which begins at the cursor, and all that follow."""
        size = self._source.data.shuffle_rows * self._source.sequence_length
        buffer: list[DocumentTokens] = []
        length = 0
        for tokens in self._tokenise_documents(cursor):
            buffer.append(tokens)
            length += len(tokens.ids)
            while length > size:  # one more than the block's inputs: the last label
                rest = _drop_tokens(buffer, size)
                yield self._build_block(number, buffer, rest[0].cursor)
                buffer, length, number = rest, length - size, number + 1

    def _build_block(self, number: int, buffer: list[DocumentTokens], end: StreamCursor) -> ShuffleBlock:
        """The first K * T + 1 tokens of the buffer as rows, shuffled."""
        source = self._source
        K, T = source.data.shuffle_rows, source.sequence_length
        tokens = np.concatenate([piece.ids for piece in buffer])[: K * T + 1]
        rows_KS = np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::T]
        offsets = np.cumsum([0, *(len(piece.ids) for piece in buffer)])  # of each piece, and the end of the last
        starts = offsets[:-1]
        is_new = np.array([piece.cursor.epoch == 0 for piece in buffer])

        # A row is of the first epoch if its last piece is: epochs only grow.
        last_piece = np.searchsorted(offsets, np.arange(1, K + 1) * T, side="right") - 1
        begins = np.array([piece.begins for piece in buffer]) & (starts < K * T)
        new_documents = np.bincount(starts[begins & is_new] // T, minlength=K)

        # The first document may have begun in the block before.
        firsts = np.flatnonzero(begins | (starts == 0))
        key = (ROW_ORDER, source.number, self._number, number)
        row_order = permute_places(np.arange(K), K, source.seed, *key)
        return ShuffleBlock(
            end=end,
            ids=rows_KS[row_order],
            rows=number * K + row_order,
            first_epoch=is_new[last_piece][row_order],
            new_documents=new_documents[row_order],
            starts=starts[firsts],
            names=[buffer[i].name for i in firsts],
        )


def deal_shards(shards: tuple[Shard, ...], stream: int, num_streams: int) -> list[tuple[Shard, int]]:
    """The shards of a stream, and the first record of each that is its own; the next are `num_streams` apart.

    With fewer shards than streams every stream reads all of them, each from another record on, so that shards of one
    document spread over the streams too.
    """
    if len(shards) >= num_streams:
        return [(shard, 0) for shard in shards[stream::num_streams]]
    return [(shard, (stream - number) % num_streams) for number, shard in enumerate(shards)]


def _drop_tokens(buffer: list[DocumentTokens], count: int) -> list[DocumentTokens]:
    """The buffer without its first `count` tokens, of which it has more."""
    for i, piece in enumerate(buffer):
        if len(piece.ids) > count:
            return [piece.drop_first(count), *buffer[i + 1 :]]
        count -= len(piece.ids)
    raise AssertionError("the buffer has no more tokens than that")


def _no_document_error(source: StreamedSource, stream: int) -> UserError:
    what = f"stream {stream} of the source {source.section.name!r} has no document to train on"
    saw = f"{source.num_streams} streams over {len(source.shards)} files"
    return UserError(Problem(what, saw, "a document for each stream at least", "data.streams, or the data"))
