"""Records of .txt and .md: the whole file, or the parts between blank lines or separators."""

import codecs
import io
from collections.abc import Iterator
from typing import BinaryIO

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents import decompress
from smoltrain.data.documents.decompress import open_decompressed, peek_head, read_bounded_lines
from smoltrain.data.documents.magic_bytes import ENCODING_HEAD_BYTES, is_utf16_or_utf32
from smoltrain.data.documents.records import (
    NOT_UTF8,
    BadRecord,
    Document,
    EmptyFileError,
    RawRecord,
    Record,
    RecordError,
    decode_utf8,
)
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import exception_message

CR_ALONE = "the lines end in CR alone, so none is blank (`tr '\\r' '\\n'` mends it)"
NOT_UTF8_BUT_WIDE = "the text is UTF-16 or UTF-32, not UTF-8 (`iconv -f UTF-16 -t UTF-8` makes it so)"


def read_text_records(
    shard: Shard, file: BinaryIO, source: SourceSection, wanted: range, limit: int
) -> Iterator[Record]:
    """The wanted records of a text, as data.documents says what one is."""
    if source.documents == "file":
        return _read_whole_file(shard, file, wanted)
    return _read_parts(shard, file, source, wanted, limit)


def _read_whole_file(shard: Shard, file: BinaryIO, wanted: range) -> Iterator[Record]:
    """The one record of a file that is not cut; it may be of any length."""
    if 0 not in wanted:
        return
    with open_decompressed(shard, file, lambda: shard.place) as plain:
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
    if not text:
        raise EmptyFileError
    yield Document(shard.name, 0, text)


def _read_parts(shard: Shard, file: BinaryIO, source: SourceSection, wanted: range, limit: int) -> Iterator[Record]:
    """The parts of a file that is cut, without the line ends around them; blank ones have no number."""
    record = -1
    with open_decompressed(shard, file, lambda: f"{shard.place}, part {record + 2}") as plain:
        head = peek_head(plain)
        has_old_lines = source.documents == "blank_lines" and b"\r\r" in head and b"\n" not in head
        if has_old_lines or is_utf16_or_utf32(head):
            if 0 in wanted:
                yield BadRecord(shard.place, 0, CR_ALONE if has_old_lines else NOT_UTF8_BUT_WIDE)
            return
        if head.startswith(codecs.BOM_UTF8):
            plain.read(len(codecs.BOM_UTF8))
        if source.documents == "separator":
            parts = _split_at_separator(plain, source.document_separator.encode(), limit)
        else:
            parts = _split_at_blank_lines(plain, limit)
        for part in parts:
            if part is not None and not part.strip():
                continue
            record += 1
            if record not in wanted:
                continue
            try:
                text = decode_utf8(part if part is None else part.strip(b"\r\n"), limit)
            except RecordError as error:
                yield error.as_record(f"{shard.place}, part {record + 1}", record)
            else:
                yield Document(f"{shard.name}:{record + 1}", record, text)
    if record < 0:
        raise EmptyFileError


def _split_at_blank_lines(file: io.BufferedIOBase, limit: int) -> Iterator[RawRecord]:
    """What stands between blank lines; None for what is longer than `limit`, of which no line is kept."""
    most = limit + len(b"\r\n")  # the end of the last line is no part of the text
    lines: list[bytes] = []
    size = 0
    for line in read_bounded_lines(file, limit):
        if line is not None and line.isspace():
            yield b"".join(lines) if size <= most else None
            lines = []
            size = 0
        else:
            size += most + 1 if line is None else len(line)
            if size > most:
                lines = []
            elif line is not None:
                lines.append(line)
    yield b"".join(lines) if size <= most else None


def _split_at_separator(file: io.BufferedIOBase, separator: bytes, limit: int) -> Iterator[RawRecord]:
    """What stands between separators; None for what is longer than `limit` and a block, which is not kept."""
    buffer = bytearray()
    too_long = False
    while block := file.read(decompress.BLOCK):
        begin = 0
        search_from = max(len(buffer) - len(separator) + 1, 0)  # what was there before holds no whole separator
        buffer += block
        while (end := buffer.find(separator, max(begin, search_from))) >= 0:
            yield None if too_long else bytes(buffer[begin:end])
            begin = end + len(separator)
            too_long = False
        del buffer[:begin]
        if len(buffer) > limit + decompress.BLOCK:
            too_long = True
            del buffer[: len(buffer) - len(separator) + 1]  # its end may be the beginning of a separator
    yield None if too_long else bytes(buffer)
