"""The records of one shard: documents, and what is in their place where a record is bad. Each keeps its number.

A record is a whole .txt or .md file (or a part of one), a line of .jsonl or a row of .parquet. Reading goes through the
shard once and forwards; no more than one record, one block or a few parquet rows are held in memory.
"""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.magic_bytes import (
    ENCODING_HEAD_BYTES,
    MAX_POINTER_BYTES,
    check_json_lines,
    check_one_record_per_line,
    detect_pointer,
    is_utf16_or_utf32,
)
from smoltrain.data.documents.shard import (
    RECORD_SUFFIXES,
    Shard,
    exception_message,
    format_suffix,
    open_shard,
    unreadable_file_error,
)
from smoltrain.errors import Problem, UserError

BLOCK = 4 * 2**20  # bytes read at once
PARQUET_BATCH_ROWS = 128  # of parquet, made into text at once
ZSTD_FRAGMENT_BYTES = 2**10  # bytes of a .zst that are decompressed at once: what comes out is at most 32 MiB
ZSTD_MAX_WINDOW = 2**31  # bytes that a .zst may look back: all that `zstd --long=31` can ask for
NOT_UTF8 = "the text is not UTF-8"
CR_ALONE = "the lines end in CR alone, so none is blank (`tr '\\r' '\\n'` mends it)"
NOT_UTF8_BUT_WIDE = "the text is UTF-16 or UTF-32, not UTF-8 (`iconv -f UTF-16 -t UTF-8` makes it so)"
RawRecord = bytes | None  # of a record; None where it is longer than allowed, and so was not kept


@dataclass(frozen=True)
class Document:
    """One text, and the name by which it is held out or trained on: SHARD, or SHARD:N (from 1) where it has many."""

    name: str
    record: int  # its number in the shard, from 0
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document, where it stands, and why, on one line."""

    place: str
    record: int
    why: str
    empty: bool = field(default=False, compare=False)  # nothing is wrong with it, but that it holds nothing


class BrokenFile(UserError):
    """The file as a whole is not what its suffix says."""


Record = Document | BadRecord


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

    Errors: UserError if the file cannot be read, or its records have no text_field (parquet; jsonl: the first one has
    none), or is only a pointer to the file; BrokenFile if its compression or its parquet makes no sense.
    """
    wanted, limit = range(first, 2**63, stride), int(max_document_mib * 2**20)
    try:
        with opener(shard) as file:
            if shard.size == 0:
                yield from _empty_file_record(shard, wanted)
                return
            if shard.size is not None and shard.size < MAX_POINTER_BYTES:
                _check_not_pointer(shard, file)
            if (suffix := format_suffix(shard.name)) == ".parquet":
                yield from _read_parquet(shard, file, source.text_field, wanted, limit)
            elif suffix in RECORD_SUFFIXES:
                yield from _read_jsonl(shard, file, source.text_field, wanted, limit)
            elif source.documents == "file":
                yield from _read_whole_file(shard, file, wanted)
            else:
                yield from _read_text_parts(shard, file, source, wanted, limit)
    except OSError as error:
        raise unreadable_file_error(error, shard.place) from None


def _check_not_pointer(shard: Shard, file: BinaryIO) -> None:
    """Errors: UserError if the file only stands for another one."""
    pointer = detect_pointer(file.read(MAX_POINTER_BYTES))
    file.seek(0)
    if pointer:
        whose, get = pointer
        what = f"the file is a pointer of {whose}, not the file itself"
        raise UserError(Problem(what, f"{shard.size:,} bytes", f"the file: `{get}` where it comes from", shard.place))


def read_head(shard: Shard, file: BinaryIO, count: int) -> bytes:
    """The first bytes of a file, decompressed; at most so many. Errors: BrokenFile."""
    with _open_decompressed(shard, file, lambda: shard.place) as plain:
        return plain.read(count)


class _RecordError(Exception):
    """Why a record is bad, in one line."""


class _EmptyRecordError(_RecordError):
    """There is nothing in it."""


def _make_bad_record(place: str, record: int, why: _RecordError) -> BadRecord:
    return BadRecord(place, record, str(why), empty=isinstance(why, _EmptyRecordError))


def _empty_file_record(shard: Shard, wanted: range) -> Iterator[Record]:
    """What a file without any record is: an empty one."""
    if 0 in wanted:
        yield BadRecord(shard.place, 0, "the file is empty", empty=True)


# ---- bytes, decompressed


@contextlib.contextmanager
def _open_decompressed(shard: Shard, file: BinaryIO, place: Callable[[], str]) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, decompressed if its suffix says so. Errors: BrokenFile with the place they make no sense."""
    raw = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, BLOCK)  # pyright: ignore[reportArgumentType]
    suffix = PurePosixPath(shard.name).suffix.lower()
    try:
        match suffix:
            case ".gz":
                yield gzip.GzipFile(fileobj=raw)
            case ".zst":
                yield io.BufferedReader(_ZstdReader(raw), 2**16)
            case _:
                yield raw
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's own, not the decompressor's
            raise
        problem = Problem(
            "the file cannot be decompressed", exception_message(error), f"a whole {suffix} file", place()
        )
        raise BrokenFile(problem) from None


class _ZstdReader(io.RawIOBase):
    """What the frames of a .zst hold, one after another, each with a window as long as it asks for."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._zstd = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._raw = self._plain = b""
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Errors: zstandard.ZstdError; EOFError within a frame."""
        while self._at == len(self._plain):
            self._raw = self._raw or self._file.read(ZSTD_FRAGMENT_BYTES)
            if not self._raw:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._zstd.decompressobj()
            self._plain, self._at = self._frame.decompress(self._raw), 0
            self._raw = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        given = self._plain[self._at : self._at + len(buffer)]
        buffer[: len(given)] = given
        self._at += len(given)
        return len(given)


def _read_bounded_lines(file: io.BufferedIOBase, limit: int) -> Iterator[RawRecord]:
    """Lines with their ends."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = file.readline(BLOCK)
            yield None


def _decode_utf8(raw: RawRecord, limit: int) -> str:
    """Errors: _Bad."""
    if raw is None or len(raw) > limit:
        raise _RecordError(f"longer than data.max_document_mib = {limit / 2**20:g}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _RecordError(f"{NOT_UTF8}: {exception_message(error)}") from None


# ---- .txt and .md


def _read_whole_file(shard: Shard, file: BinaryIO, wanted: range) -> Iterator[Record]:
    """The one record of a file that is not cut; it may be of any length."""
    if 0 not in wanted:
        return
    with _open_decompressed(shard, file, lambda: shard.place) as plain:
        raw = plain.read().removeprefix(codecs.BOM_UTF8)
    if is_utf16_or_utf32(raw[:ENCODING_HEAD_BYTES]):
        yield BadRecord(shard.place, 0, NOT_UTF8_BUT_WIDE)
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        yield BadRecord(f"{shard.place}:{line}", 0, f"{NOT_UTF8}: {exception_message(error)}")
        return
    yield from [Document(shard.name, 0, text)] if text else _empty_file_record(shard, wanted)


def _read_text_parts(
    shard: Shard, file: BinaryIO, source: SourceSection, wanted: range, limit: int
) -> Iterator[Record]:
    """The parts of a file that is cut, without the line ends around them; those without a character do not count."""
    record = -1
    with _open_decompressed(shard, file, lambda: f"{shard.place}, part {record + 2}") as plain:
        opening = _peek_head(plain)
        old_lines = source.documents == "blank_lines" and b"\r\r" in opening and b"\n" not in opening
        if old_lines or is_utf16_or_utf32(opening):
            if 0 in wanted:
                yield BadRecord(shard.place, 0, CR_ALONE if old_lines else NOT_UTF8_BUT_WIDE)
            return
        if opening.startswith(codecs.BOM_UTF8):
            plain.read(3)
        if source.documents == "separator":
            parts = _split_at_separator(plain, source.document_separator.encode(), limit)
        else:
            parts = _split_at_blank_lines(plain, limit)
        full = (part for part in parts if part is None or not (part.isspace() or part == b""))
        for record, part in enumerate(full):
            if record in wanted:
                try:
                    text = _decode_utf8(part if part is None else part.strip(b"\r\n"), limit)
                    yield Document(f"{shard.name}:{record + 1}", record, text)
                except _RecordError as bad:
                    yield _make_bad_record(f"{shard.place}, part {record + 1}", record, bad)
    if record < 0:
        yield from _empty_file_record(shard, wanted)


def _peek_head(file: io.BufferedIOBase) -> bytes:
    """The next bytes, which remain to be read: look_alikes.HEAD of them, or fewer."""
    return file.peek(ENCODING_HEAD_BYTES)[:ENCODING_HEAD_BYTES]  # pyright: ignore[reportAttributeAccessIssue]


def _split_at_blank_lines(file: io.BufferedIOBase, limit: int) -> Iterator[RawRecord]:
    lines: list[bytes] = []
    size = 0
    for line in _read_bounded_lines(file, limit):
        if line is not None and line.isspace():
            yield b"".join(lines) if size <= limit + 2 else None
            lines, size = [], 0
        else:
            size += limit + 3 if line is None else len(line)  # two of them are the end of the last line
            if line is None or size > limit + 2:
                lines = []
            else:
                lines.append(line)
    yield b"".join(lines) if size <= limit + 2 else None


def _split_at_separator(file: io.BufferedIOBase, separator: bytes, limit: int) -> Iterator[RawRecord]:
    buffer, too_long = bytearray(), False
    while block := file.read(BLOCK):
        begin, seek = 0, max(len(buffer) - len(separator) + 1, 0)  # what was in the buffer holds no whole separator
        buffer += block
        while (end := buffer.find(separator, max(begin, seek))) >= 0:
            yield None if too_long else bytes(buffer[begin:end])
            begin, too_long = end + len(separator), False
        del buffer[:begin]
        if len(buffer) > limit + BLOCK:
            too_long = True
            del buffer[: len(buffer) - len(separator) + 1]
    yield None if too_long else bytes(buffer)


# ---- .jsonl, and .json and .ndjson, which must be the same


def _read_jsonl(shard: Shard, file: BinaryIO, text_field: str, wanted: range, limit: int) -> Iterator[Record]:
    record, found = -1, False
    with _open_decompressed(shard, file, lambda: f"{shard.place}:{record + 2}") as plain:
        check_json_lines(_peek_head(plain), shard.place)
        for record, line in enumerate(_read_bounded_lines(plain, limit)):
            if line is not None and line.isspace():
                continue
            if record in wanted or not found:
                place = f"{shard.place}:{record + 1}"
                try:
                    fields = _parse_json_object(line, limit)
                    if not found and text_field not in fields:
                        raise _missing_field_error(text_field, list(fields), place)
                    if record in wanted:
                        yield Document(f"{shard.name}:{record + 1}", record, _extract_text(fields, text_field))
                except _RecordError as bad:
                    if not found and line is not None:
                        check_one_record_per_line(line, shard.place)
                    if record in wanted:
                        yield _make_bad_record(place, record, bad)
            found = True
    if not found:
        yield from _empty_file_record(shard, wanted)


def _parse_json_object(line: RawRecord, limit: int) -> dict[str, Any]:
    """The JSON object of a line. Errors: _Bad."""
    try:
        value = json.loads(_decode_utf8(line, limit + 1).removeprefix("\ufeff"))  # the one more is the line's end
    except (ValueError, RecursionError) as error:
        raise _RecordError(f"the line is not JSON: {exception_message(error)}") from None
    if not isinstance(value, dict):
        raise _RecordError(f"the line is no JSON object, but {type(value).__name__}")
    return value


def _extract_text(fields: dict[str, Any], text_field: str) -> str:
    """The text of a record. JSON can spell lone surrogates ("\\ud800"), which no UTF-8 text contains. Errors: _Bad."""
    value = fields.get(text_field)
    if value is None and text_field in fields:
        raise _EmptyRecordError(f"the field {text_field!r} is no text, but null")
    if not isinstance(value, str):
        saw = "missing" if text_field not in fields else f"a {type(value).__name__}"
        raise _RecordError(f"the field {text_field!r} is no text, but {saw}")
    if not value:
        raise _EmptyRecordError("the text is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _RecordError(f"{NOT_UTF8}: {exception_message(error)}") from None
    return value


def _missing_field_error(text_field: str, exist: list[str], place: str) -> UserError:
    want = "one of " + ", ".join(map(repr, exist)) if exist else "records with fields"
    return UserError(Problem("the text field is missing", repr(text_field), want, f"data.text_field, or {place}"))


# ---- .parquet


def _read_parquet(shard: Shard, file: BinaryIO, text_field: str, wanted: range, limit: int) -> Iterator[Record]:
    try:
        with pq.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False) as table:  # row groups may be huge
            schema = table.schema_arrow
            if text_field not in schema.names:
                raise _missing_field_error(text_field, schema.names, shard.place)
            if schema.names.count(text_field) > 1:
                saw, want = f"{schema.names.count(text_field)} of them", "one; or another field"
                what = f"there are several columns {text_field!r}"
                raise UserError(Problem(what, saw, want, f"data.text_field, or {shard.place}"))
            _check_text_column(schema.field(text_field).type, text_field, shard.place)
            begin = 0
            for group in range(table.num_row_groups):
                end = begin + table.metadata.row_group(group).num_rows
                if _clip_record_range(wanted, begin, end):
                    for batch in table.iter_batches(PARQUET_BATCH_ROWS, [group], [text_field], use_threads=False):
                        column = batch.column(batch.schema.names.index(text_field))  # "a.b" brings the b of a along
                        yield from _read_parquet_batch(shard, column, text_field, begin, wanted, limit)
                        begin += batch.num_rows
                begin = end
            if begin == 0:
                yield from _empty_file_record(shard, wanted)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what, want = "the file cannot be read as parquet", "a whole parquet file"
        raise BrokenFile(Problem(what, exception_message(error), want, shard.place)) from None


def _check_text_column(kind: pa.DataType, text_field: str, place: str) -> None:
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
        what = f"the field {text_field!r} is not text"
        raise UserError(Problem(what, str(kind), "a string", f"data.text_field, or {place}"))


def _clip_record_range(wanted: range, begin: int, end: int) -> range:
    """Those of the wanted records that are at least begin and less than end."""
    start = begin + (wanted.start - begin) % wanted.step if begin > wanted.start else wanted.start
    return range(start, end, wanted.step)


def _read_parquet_batch(
    shard: Shard, column: pa.Array, text_field: str, begin: int, wanted: range, limit: int
) -> Iterator[Record]:
    """The wanted ones of some rows, the first of which is number `begin`."""
    records = _clip_record_range(wanted, begin, begin + len(column))
    if not records:
        return
    if not pa.types.is_string(column.type):
        column = column.cast(pa.large_string())
    if wanted.step == 1:
        column = column[records.start - begin :]
    else:
        column = column.take(pa.array([record - begin for record in records]))
    for record, text in zip(records, _decode_text_column(column, text_field, limit), strict=True):
        if isinstance(text, _RecordError):
            yield _make_bad_record(f"{shard.place}, row {record + 1}", record, text)
        else:
            yield Document(f"{shard.name}:{record + 1}", record, text)


def _decode_text_column(column: pa.Array, text_field: str, limit: int) -> list[str | _RecordError]:
    """The values of a column, made into Python's all at once unless one of them is bad."""
    sizes = pc.call_function("min_max", [pc.call_function("binary_length", [column])]).as_py()
    with contextlib.suppress(UnicodeDecodeError):
        if not column.null_count and sizes["min"] > 0 and sizes["max"] <= limit:
            return column.to_pylist()
    texts: list[str | _RecordError] = []
    for value in column:
        try:
            raw = value.as_buffer().to_pybytes() if value.is_valid and len(value.as_buffer()) <= limit else None
            texts.append(_extract_text({text_field: _decode_utf8(raw, limit) if value.is_valid else None}, text_field))
        except _RecordError as bad:
            texts.append(bad)
    return texts
