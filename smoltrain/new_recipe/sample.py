"""The sample of a text that a recipe is planned on: what its files hold, and how much there is of it.

Of a small text all of it is read. Equal files give equal answers.
"""

import contextlib
import functools
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents.check_files import SEPARATOR_SEARCH_FILES, check_source_files, find_files_with_separator
from smoltrain.data.documents.listing import SourceListing, exclude_shared_files, list_one_source
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.documents.readers import count_records, has_fields, read_records
from smoltrain.data.documents.records import Document
from smoltrain.data.documents.retry import open_with_retry
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokens.plan_preparation import choose_data_mode
from smoltrain.errors import Problem, UserError
from smoltrain.new_recipe.wish import option_of_key

SAMPLE_BYTES = 8 * 2**20  # of text
SHARD_BYTES = 2**20  # of text out of one of many files
GZIP_READ_BYTES = 2**10
FEWEST_FILES_TO_STREAM = 128  # each a document: one for each of at most 64 streams, whatever share is held out


@dataclass(frozen=True)
class TextSample:
    """Documents of a source, and about how much text all of it is."""

    documents: tuple[Document, ...]
    total_bytes: float  # of UTF-8 of the whole source
    is_whole: bool  # the documents are all of it
    num_files: int
    is_streamed: bool  # a run would read them while it trains, unless it is told otherwise
    notes: tuple[str, ...]  # lines that were found out about the files
    parts_documents: bool  # the separator stands in files that would otherwise be one document each
    all_fields: bool  # records of jsonl or parquet, of which a file holds many
    document_bytes: tuple[tuple[str, int], ...] | None  # name and size of each; None where they are not all known
    held_out_bytes: float | None  # of UTF-8 of its own validation side; None where it has none

    @property
    def num_bytes(self) -> int:
        """Bytes of the sample."""
        return sum(len(document.text.encode()) for document in self.documents)

    @property
    def needs_cached_mode(self) -> bool:
        """Whether a run would stream this text, which may be fewer documents than streams: it would be refused.

        A text that was read whole is so small that none of it need be read while training.
        """
        is_few = not self.all_fields and not self.parts_documents and self.num_files < FEWEST_FILES_TO_STREAM
        return self.is_streamed and (self.is_whole or is_few)


def sample_text(data: DataSection) -> TextSample:
    """Read the sample. Errors: UserError if there is no file, a file cannot be read, or no file holds any text.

    A file behind a network is asked for again for up to data.patience_s.
    """
    (part,) = data.parts
    try:
        listing = exclude_shared_files({part.name: list_one_source(part, data)}, data)[part.name]
        parts_documents = _has_separators(part, data, listing)
        if parts_documents:
            data = data.model_copy(update={"documents": "separator"})
            (part,) = data.parts
        notes = check_source_files({part.name: listing}, data)
        text = _read_sample(part, data, listing.shards, "--data" if part.hub is None else "--hub")
        held_out = _read_sample(part, data, listing.held_out, "--validation") if listing.held_out else None
    except UserError as error:
        raise UserError(*(_blame_option(problem) for problem in error.problems)) from None
    return TextSample(
        documents=tuple(text.documents),
        total_bytes=text.total_bytes,
        is_whole=text.is_whole,
        num_files=len(listing.shards),
        is_streamed=choose_data_mode(data, {part.name: listing})[0] == "stream",
        notes=tuple(notes),
        parts_documents=parts_documents,
        all_fields=all(has_fields(shard.name) for shard in listing.shards),
        document_bytes=_list_document_bytes(text, listing.shards, parts_documents),
        held_out_bytes=held_out.total_bytes if held_out else None,
    )


@dataclass
class _Sample:
    """Documents of some files, and about how many bytes of UTF-8 all of these files hold."""

    documents: list[Document]
    total_bytes: float
    is_whole: bool


def _read_sample(part: MixedSource, data: DataSection, shards: Sequence[Shard], option: str) -> _Sample:
    """Documents up to SAMPLE_BYTES, of each of many files at most about SHARD_BYTES, unless all are read whole.

    Files are taken in an order that has nothing to do with their names' order, so that the sample is like the whole.
    Errors: UserError if a file cannot be read, or no file holds any text; it is to be changed at the option.
    """
    file_bytes = sum(shard.size or 0 for shard in shards)
    of_each = max(SHARD_BYTES, SAMPLE_BYTES // len(shards))
    most = math.inf if file_bytes <= SAMPLE_BYTES else of_each
    documents: list[Document] = []
    kept_bytes = 0  # of the documents
    text_bytes = 0  # of what was read for them
    read_bytes = 0.0  # of the files
    is_whole = True
    for shard in sorted(shards, key=lambda shard: hashlib.sha256(shard.name.encode()).digest()):
        if kept_bytes >= SAMPLE_BYTES and math.isfinite(most):
            is_whole = False
            break
        read = _read_begin(part, data, shard, most)
        documents += read.documents
        kept_bytes += read.kept_bytes
        text_bytes += read.text_bytes
        read_bytes += read.share * (shard.size or 0)
        is_whole = is_whole and read.is_whole
    if not documents:
        saw = f"none in {len(shards):,} file{'s' * (len(shards) > 1)}"
        raise UserError(Problem("the data hold no text", saw, "at least one document", option))
    return _Sample(documents, text_bytes if is_whole else file_bytes * text_bytes / max(1.0, read_bytes), is_whole)


@dataclass
class _Begin:
    """The first documents of a file."""

    documents: list[Document]
    kept_bytes: int  # of UTF-8 of them, as they are cut
    text_bytes: int  # of UTF-8 of all that came out of `share`
    share: float  # of the file that was read, up to 1
    is_whole: bool  # the documents are all of the file


def _read_begin(part: MixedSource, data: DataSection, shard: Shard, most: float) -> _Begin:
    """The documents of the first `most` bytes of text, the last of which may be cut there.

    Readers and decompressors are up to a block ahead of the documents that they give. So a place in the file and the
    text before it are compared where the next block is asked for; until then documents are counted, and not kept.
    """
    opened: list[BinaryIO] = []

    def open_and_keep(shard: Shard) -> BinaryIO:
        file = open_with_retry(shard, data, ReaderHealth())
        opened.append(_ShortReader(file) if shard.name.lower().endswith(".gz") else file)  # pyright: ignore[reportArgumentType]
        return opened[0]

    begin = _Begin([], kept_bytes=0, text_bytes=0, share=1.0, is_whole=True)
    place = 0
    records = read_records(shard, part, max_document_mib=data.max_document_mib, opener=open_and_keep)
    with contextlib.closing(records):
        for record in records:
            if not isinstance(record, Document):
                continue
            if begin.kept_bytes >= most and opened[0].tell() != place:
                begin.share = place / max(1, shard.size or 0)
                begin.is_whole = False
                break
            place = opened[0].tell()
            _add_document(begin, record, most)
            num_records = count_records(shard, opened[0]) if begin.kept_bytes >= most else None
            if num_records is not None:
                begin.share = (record.record + 1) / num_records
                begin.is_whole = begin.is_whole and begin.share == 1
                break
    return begin


class _ShortReader(io.BufferedReader):
    """Gives at most GZIP_READ_BYTES at once: gzip fills up what it has read ahead all the time, with 8 to 128 KiB."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As BufferedReader's, but less."""
        return super().read(GZIP_READ_BYTES if size is None or size < 0 else min(size, GZIP_READ_BYTES))


def _add_document(begin: _Begin, document: Document, most: float) -> None:
    """Count a document, and keep what there is room for."""
    size = len(document.text.encode())
    begin.text_bytes += size
    if begin.kept_bytes >= most:
        begin.is_whole = False
    elif size > most:
        begin.is_whole = False
        kept = document.text[: int(most)]
        begin.documents.append(replace(document, text=kept))
        begin.kept_bytes += len(kept.encode())
    else:
        begin.documents.append(document)
        begin.kept_bytes += size


def _list_document_bytes(
    text: _Sample, shards: Sequence[Shard], parts_documents: bool
) -> tuple[tuple[str, int], ...] | None:
    """Name and size of each document, where all were read or each file is one."""
    if text.is_whole:
        return tuple((document.name, len(document.text.encode())) for document in text.documents)
    if parts_documents or any(has_fields(shard.name) for shard in shards):
        return None
    return tuple((shard.name, shard.size or 0) for shard in shards)


def _has_separators(part: MixedSource, data: DataSection, listing: SourceListing) -> bool:
    """Whether the text that parts documents stands in every file of text that is looked into."""
    num_texts = sum(not has_fields(shard.name) for shard in listing.all_shards)
    opener = functools.partial(open_with_retry, data=data, health=ReaderHealth())
    found = find_files_with_separator(part, listing.all_shards, opener)
    return 0 < min(num_texts, SEPARATOR_SEARCH_FILES) == len(found)


def _blame_option(problem: Problem) -> Problem:
    """The same, but to be changed is the option that a recipe's key was made of."""
    return replace(problem, change=option_of_key(problem.change))
