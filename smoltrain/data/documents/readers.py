"""The records of one shard: documents, and what is in their place where a record is bad. Each keeps its number.

FORMATS says how the files of each suffix are read: a new format is a reader and a line there (docs/extending.md).
The readers are our own, where the usual libraries give a stream of documents: here each record has a number, any slice
(first, stride) of them can be read, and a bad one is named and passed over. So a run resumes at the very record, and
streams share a shard. Reading goes through a shard once and forwards; no more than one record, one block or a few
parquet rows are held in memory.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.decompress import COMPRESSIONS, open_decompressed
from smoltrain.data.documents.magic_bytes import MAX_POINTER_BYTES, detect_pointer
from smoltrain.data.documents.read_jsonl import read_jsonl_records
from smoltrain.data.documents.read_parquet import count_parquet_rows, read_parquet_records
from smoltrain.data.documents.read_text import read_text_records
from smoltrain.data.documents.records import BadRecord, EmptyFileError, Record
from smoltrain.data.documents.shard import Shard, open_shard, report_unreadable
from smoltrain.errors import Problem, UserError

# (shard, its bytes, source, numbers of the wanted records, most bytes of one) -> the wanted records, in order.
# Errors: EmptyFileError if the file has no record at all; BrokenFile, UserError.
Reader = Callable[[Shard, BinaryIO, SourceSection, range, int], Iterator[Record]]


@dataclass(frozen=True)
class Format:
    """How the files of one suffix are read."""

    read: Reader
    has_fields: bool  # a document is the text_field of a record; else it is the file, or a part of it
    count: Callable[[BinaryIO], int] | None = None  # how many records there are, where the file itself says so
    may_be_compressed: bool = True  # a suffix of COMPRESSIONS may stand behind its own


FORMATS: dict[str, Format] = {
    ".txt": Format(read_text_records, has_fields=False),
    ".md": Format(read_text_records, has_fields=False),
    ".jsonl": Format(read_jsonl_records, has_fields=True),
    ".json": Format(read_jsonl_records, has_fields=True),
    ".ndjson": Format(read_jsonl_records, has_fields=True),
    ".parquet": Format(  # it compresses its own columns
        read_parquet_records, has_fields=True, count=count_parquet_rows, may_be_compressed=False
    ),
}


def format_suffix(name: str) -> str:
    """The suffix that says how to read a file: the one before .gz or .zst, if it has such; '' if it has none."""
    *_, before, last = ["", "", *PurePosixPath(name.lower()).suffixes]
    if last in COMPRESSIONS and not (before in FORMATS and not FORMATS[before].may_be_compressed):
        return before
    return last


def find_format(name: str) -> Format | None:
    """How a file of that name is read; None if it cannot be."""
    return FORMATS.get(format_suffix(name))


def has_fields(name: str) -> bool:
    """Whether the records of a file of that name have fields, one of which is the text."""
    found = find_format(name)
    return found is not None and found.has_fields


def count_records(shard: Shard, file: BinaryIO) -> int | None:
    """How many records an open file has; None where only who reads all of it knows."""
    found = find_format(shard.name)
    return found.count(file) if found is not None and found.count is not None else None


def strip_compression(name: str) -> str:
    """The name of a readable file without the .gz or .zst behind it."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in COMPRESSIONS and find_format(name) else name


def describe_formats() -> str:
    """The suffixes that can be read, those that cannot be compressed last."""
    suffixes = sorted(FORMATS, key=lambda suffix: not FORMATS[suffix].may_be_compressed)
    return f"{' or '.join(suffixes)}, or all but the last with {' or '.join(sorted(COMPRESSIONS))} behind it"


def read_records(
    shard: Shard,
    source: SourceSection,
    *,
    first: int = 0,
    stride: int = 1,
    max_document_mib: float,
    opener: Callable[[Shard], BinaryIO] = open_shard,
) -> Generator[Record]:
    """The records number first, first + stride, ... of a shard, in its order. Blank lines and blank parts are none.

    Errors: UserError if the file cannot be read, is only a pointer to the file, holds JSON that is no lines, or a
    parquet column that is not text, or has no text_field (parquet; jsonl: its first record has none); BrokenFile if its
    compression or its parquet makes no sense.
    """
    wanted = range(first, 2**63, stride)
    limit = int(max_document_mib * 2**20)
    file_format = find_format(shard.name)
    assert file_format is not None, f"{shard.name} was listed, so it can be read"
    try:
        with report_unreadable(shard), opener(shard) as file:
            if shard.size == 0:
                raise EmptyFileError
            if shard.size is not None and shard.size < MAX_POINTER_BYTES:
                _check_not_pointer(shard, file)
            yield from file_format.read(shard, file, source, wanted, limit)
    except EmptyFileError:
        if 0 in wanted:
            yield BadRecord(shard.place, 0, "the file is empty", empty=True)


def _check_not_pointer(shard: Shard, file: BinaryIO) -> None:
    """Errors: UserError if the file only stands for another one."""
    pointer = detect_pointer(file.read(MAX_POINTER_BYTES))
    file.seek(0)
    if pointer is not None:
        what = f"the file is a pointer of {pointer.tool}, not the file itself"
        want = f"the file: `{pointer.command}` where it comes from"
        raise UserError(Problem(what, f"{shard.size:,} bytes", want, shard.place))


def read_head(shard: Shard, file: BinaryIO, count: int) -> bytes:
    """The first bytes of a file, decompressed; at most so many. Errors: BrokenFile."""
    with open_decompressed(shard, file, lambda: shard.place) as plain:
        return plain.read(count)
