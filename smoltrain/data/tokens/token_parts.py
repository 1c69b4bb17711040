"""Parts of a source's tokens: the unit that is tokenised at once, by one process, and is whole or made anew.

The shards of a source are cut into parts, a function of the shards alone. Each has its own files FOLDER/NAME/
{train,validation}-00000.bin and so on. part-00000.json says what the part was made from and is written last.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain import files
from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents import retry
from smoltrain.data.documents.bad_records import BadRecordEntry, log_bad_record
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.documents.listing import SourceListing, has_own_validation
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.documents.records import BadRecord, Document
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.index import INDEX_DIGEST_KEY, SIDES, PartRecord, check_part_record
from smoltrain.data.tokens.packing import encode_documents, token_dtype
from smoltrain.data.tokens.token_files import TokenWriter, content_hash, pack_address

PART_BYTES = 64 * 2**20  # of shards as they lie on a disk: no part but the last of a source is shorter


class PartCount(IntEnum):
    """What is counted of a part, by its column in TokeniseJob.counts."""

    DOCUMENTS = 0
    TRAIN_TOKENS = 1
    VALIDATION_TOKENS = 2
    BYTES = 3
    BAD = 4
    EMPTY = 5


RECORD_COUNTS = [PartCount.DOCUMENTS, PartCount.BAD, PartCount.EMPTY]
TOKEN_COUNTS = {"train": PartCount.TRAIN_TOKENS, "validation": PartCount.VALIDATION_TOKENS}


@dataclass(frozen=True)
class TokenPart:
    """Consecutive shards of one source, and where their tokens go."""

    source: MixedSource
    number: int
    shards: tuple[Shard, ...]
    first_shard: int  # the first one's number among all shards of the source
    size: int  # their bytes, one of unknown size as PART_BYTES
    side: str | None  # of all of its documents; None: by their names
    folder: Path  # FOLDER/NAME
    made_of: str  # SHA-256 of all that its bytes are a function of

    @property
    def record_file(self) -> Path:
        """What says that the part is whole."""
        return self.folder / f"part-{self.number:05}.json"


@dataclass(frozen=True)
class PartDocument:
    """What is to be known of a document beside its text."""

    side: str
    content_hash: int
    address: int


@dataclass
class TokeniseJob:
    """All parts, and what a process needs to make any of them."""

    data: DataSection
    tokenizer: Tokenizer
    parts: list[TokenPart]
    counts: np.ndarray  # (parts, len(PartCount)) int64, how far each part is; several processes share its memory
    health: ReaderHealth

    def tokenise_part(self, number: int) -> None:
        """Make one part. Errors: UserError for bad data."""
        part, counts = self.parts[number], self.counts[number]
        counts[:] = 0
        bad: list[BadRecordEntry] = []
        writers = {side: TokenWriter(part.folder, f"{side}-{part.number:05}", self.tokenizer) for side in SIDES}
        try:
            current = None
            documents = self._read_documents(number, bad)
            for piece in encode_documents(documents, self.tokenizer, token_dtype(self.tokenizer)):
                document = piece.about
                if document is not current:
                    current = document
                    writers[document.side].begin_document(document.content_hash, document.address)
                    counts[PartCount.DOCUMENTS] += 1
                writers[document.side].add_piece(piece)
                counts[TOKEN_COUNTS[document.side]] += len(piece.ids)
            train, validation = (writers[side].commit() for side in SIDES)
        finally:
            for writer in writers.values():
                writer.discard()
        num_empty = int(counts[PartCount.EMPTY])
        entries: list[Any] = [asdict(entry) for entry in bad]
        record = PartRecord(made_of=part.made_of, train=train, validation=validation, bad=entries, empty=num_empty)
        files.write_json_file(part.record_file, files.seal_json(record.to_json(), INDEX_DIGEST_KEY))
        counts[PartCount.BYTES] = part.size

    def count_records(self, source: str) -> np.ndarray:
        """(len(PartCount),) of one source, so far."""
        own = [part.source.name == source for part in self.parts]
        return self.counts[own].sum(0)

    def describe_progress(self) -> tuple[str, float]:
        """How far all parts are together: in words, and as a share of the bytes."""
        done = self.counts.sum(0)
        tokens = " and ".join(f"{done[column]:,} {side} tokens" for side, column in TOKEN_COUNTS.items())
        share = done[PartCount.BYTES] / max(1, sum(part.size for part in self.parts))
        return f"{tokens} of {done[PartCount.DOCUMENTS]:,} documents", share

    def _read_documents(self, number: int, bad: list[BadRecordEntry]) -> Iterator[tuple[PartDocument, str]]:
        """Each document of a part, with its text; what is bad goes to the log and into `bad`."""
        part, counts = self.parts[number], self.counts[number]
        for shard_number, shard in enumerate(part.shards, part.first_shard):
            end = counts[PartCount.BYTES] + (shard.size or 0)
            for record in retry.read_records_with_retry(shard, part.source, data=self.data, health=self.health):
                match record:
                    case BadRecord(empty=True):
                        counts[PartCount.EMPTY] += 1
                    case BadRecord():
                        counts[PartCount.BAD] += 1
                        bad.append(self._log_bad_record(part, record))
                    case Document(name, _, text):
                        side = "validation" if is_held_out(name, self.data.validation_share) else "train"
                        address = pack_address(shard_number, shard, record)
                        yield PartDocument(part.side or side, content_hash(text), address), text
                        # Characters are near enough to bytes, until the shard ends.
                        counts[PartCount.BYTES] = min(counts[PartCount.BYTES] + len(text), end)
            counts[PartCount.BYTES] = end

    def _log_bad_record(self, part: TokenPart, record: BadRecord) -> BadRecordEntry:
        """Errors: UserError past what the whole source may have, as far as all processes have read it."""
        counts = self.count_records(part.source.name)
        num_bad, num_records = int(counts[PartCount.BAD]), int(counts[RECORD_COUNTS].sum())
        return log_bad_record(part.folder.parent, part.source.name, record, num_bad, num_records, self.data)


def plan_parts(
    source: MixedSource, listing: SourceListing, fingerprint: dict[str, Any], tokenizer: Tokenizer, folder: Path
) -> list[TokenPart]:
    """The shards in groups of PART_BYTES or a little more, the training side's first."""
    of_source = fingerprint["sources"][source.name]
    settings = {key: value for key, value in of_source.items() if not isinstance(value, dict)}
    train_side = "train" if has_own_validation(source) else None
    groups = [(train_side, of_source.get("files", {}), group) for group in _group_shards(listing.shards)]
    held_out_files = of_source.get("validation_files", {})
    groups += [("validation", held_out_files, group) for group in _group_shards(listing.held_out)]
    parts: list[TokenPart] = []
    first_shard = 0
    for side, known, group in groups:
        shards = [[shard.name, known.get(shard.name, shard.version)] for shard in group]
        inputs = [settings, first_shard, shards, side, tokenizer.fingerprint(), tokenizer.separator]
        made_of = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        size = sum(map(_size_on_disk, group))
        parts.append(TokenPart(source, len(parts), group, first_shard, size, side, folder, made_of))
        first_shard += len(group)
    return parts


def load_whole_part(part: TokenPart, itemsize: int) -> PartRecord | None:
    """The record of a part that is whole, made of the same inputs, and as it was written; None of any other part.

    Its ids take `itemsize` bytes each.
    """
    try:
        record = check_part_record(json.loads(files.read_text_file(part.record_file)), part.number, itemsize)
        if record is None or record.made_of != part.made_of:
            return None
        is_whole = all(files.file_sha256(part.folder / name) == made.sha256 for name, made in record.files.items())
    except (OSError, ValueError, RecursionError):
        return None
    return record if is_whole else None


def _group_shards(shards: tuple[Shard, ...]) -> Iterator[tuple[Shard, ...]]:
    """Consecutive shards, in groups of PART_BYTES or a little more; the last one may be smaller."""
    group: list[Shard] = []
    size = 0
    for shard in shards:
        group.append(shard)
        size += _size_on_disk(shard)
        if size >= PART_BYTES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def _size_on_disk(shard: Shard) -> int:
    return PART_BYTES if shard.size is None else shard.size
