"""The sample of a text that a recipe is planned on: what its files hold, and how much there is of it.

Of a small text all of it is read. Equal files give equal answers.
"""

import contextlib
import hashlib
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
from smoltrain.errors import Problem, UserError
from smoltrain.new_recipe.wish import option_of_key

SAMPLE_BYTES = 8 * 2**20  # of text
SHARD_BYTES = 2**20  # of text out of one of many files


@dataclass(frozen=True)
class TextSample:
    """Documents of a source, and about how much text all of it is."""

    documents: tuple[Document, ...]
    total_bytes: float  # of UTF-8 of the whole source
    is_whole: bool  # the documents are all of it
    num_files: int
    file_bytes: float  # of all files, as they lie there
    notes: tuple[str, ...]  # lines that were found out about the files
    parts_documents: bool  # the separator stands in files that would otherwise be one document each
    all_fields: bool  # records of jsonl or parquet, of which a file holds many
    held_out_bytes: float | None  # of UTF-8 of its own validation side; None where it has none

    @property
    def num_bytes(self) -> int:
        """Bytes of the sample."""
        return sum(len(document.text.encode()) for document in self.documents)


def sample_text(data: DataSection) -> TextSample:
    """Read the sample. Errors: UserError if there is no file, a file cannot be read, or no file holds any text.

    A file behind a network is asked for again for up to data.patience_s.
    """
    (part,) = data.parts
    try:
        listing = exclude_shared_files({part.name: list_one_source(part, data)}, data)[part.name]
        parts_documents = _has_separators(part, listing)
        if parts_documents:
            data = data.model_copy(update={"documents": "separator"})
            (part,) = data.parts
        notes = check_source_files({part.name: listing}, data)
        text = _read_sample(part, data, listing.shards, "--data" if part.hub is None else "--hub")
        held_out = _read_sample(part, data, listing.held_out, "--validation") if listing.held_out else None
    except UserError as error:
        raise UserError(*(_blame_option(problem) for problem in error.problems)) from None
    return TextSample(
        documents=tuple(text.documents), total_bytes=text.total_bytes, is_whole=text.is_whole,
        num_files=len(listing.shards), file_bytes=_count_file_bytes(listing.shards), notes=tuple(notes),
        parts_documents=parts_documents, all_fields=all(has_fields(shard.name) for shard in listing.shards),
        held_out_bytes=held_out.total_bytes if held_out else None,
    )  # fmt: skip


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
    file_bytes = _count_file_bytes(shards)
    of_each = max(SHARD_BYTES, SAMPLE_BYTES // len(shards))
    most = math.inf if file_bytes <= SAMPLE_BYTES else of_each
    documents: list[Document] = []
    text_bytes = 0
    read_bytes = 0.0  # of the files
    is_whole = True
    for shard in sorted(shards, key=lambda shard: hashlib.sha256(shard.name.encode()).digest()):
        if text_bytes >= SAMPLE_BYTES and math.isfinite(most):
            is_whole = False
            break
        read = _read_begin(part, data, shard, most)
        documents += read.documents
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
    text_bytes: int  # of UTF-8 of them, uncut
    share: float  # of the file that was read, up to 1
    is_whole: bool  # the documents are all of the file


def _read_begin(part: MixedSource, data: DataSection, shard: Shard, most: float) -> _Begin:
    """The documents of the first `most` bytes of text, the last of which is cut there."""
    opened: list[BinaryIO] = []

    def open_and_keep(shard: Shard) -> BinaryIO:
        opened.append(open_with_retry(shard, data, ReaderHealth()))
        return opened[0]

    documents: list[Document] = []
    text_bytes = 0
    records = read_records(shard, part, max_document_mib=data.max_document_mib, opener=open_and_keep)
    with contextlib.closing(records):
        for record in records:
            if not isinstance(record, Document):
                continue
            size = len(record.text.encode())
            documents.append(record if size <= most else replace(record, text=record.text[: int(most)]))
            text_bytes += size
            if text_bytes >= most:
                num_records = count_records(shard, opened[0])
                read = opened[0].tell() if num_records is None else record.record + 1
                return _Begin(documents, text_bytes, read / max(1, num_records or shard.size or 0), is_whole=False)
    return _Begin(documents, text_bytes, 1.0, is_whole=True)


def _count_file_bytes(shards: Sequence[Shard]) -> int:
    return sum(shard.size or 0 for shard in shards)


def _has_separators(part: MixedSource, listing: SourceListing) -> bool:
    """Whether the text that parts documents stands in every file of text that is looked into."""
    num_texts = sum(shard.is_local and not has_fields(shard.name) for shard in listing.all_shards)
    return 0 < min(num_texts, SEPARATOR_SEARCH_FILES) == len(find_files_with_separator(part, listing.all_shards))


def _blame_option(problem: Problem) -> Problem:
    """The same, but to be changed is the option that a recipe's key was made of."""
    return replace(problem, change=option_of_key(problem.change))
