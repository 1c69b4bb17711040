"""Records of .jsonl, and of .json and .ndjson, which must be the same: one JSON object on each line."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.decompress import open_decompressed, peek_head, read_bounded_lines
from smoltrain.data.documents.magic_bytes import check_json_lines, check_one_record_per_line
from smoltrain.data.documents.records import (
    Document,
    EmptyFileError,
    RawRecord,
    Record,
    RecordError,
    decode_utf8,
    extract_text,
    missing_field_error,
)
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import exception_message


def read_jsonl_records(
    shard: Shard, file: BinaryIO, source: SourceSection, wanted: range, limit: int
) -> Iterator[Record]:
    """The wanted lines; blank ones have a number, but are no records.

    Errors: UserError if its first bytes, or its first record, show that no line can be read.
    """
    record = -1
    is_first = True  # no line came by that is not blank
    with open_decompressed(shard, file, lambda: f"{shard.place}:{record + 2}") as plain:
        check_json_lines(peek_head(plain), shard.place)
        for record, line in enumerate(read_bounded_lines(plain, limit)):
            if line is not None and line.isspace():
                continue
            place = f"{shard.place}:{record + 1}"
            if is_first:
                _check_first_record(line, source.text_field, limit, shard, place)
                is_first = False
            if record not in wanted:
                continue
            try:
                text = extract_text(_parse_json_object(line, limit), source.text_field)
            except RecordError as error:
                yield error.as_record(place, record)
            else:
                yield Document(f"{shard.name}:{record + 1}", record, text)
    if is_first:
        raise EmptyFileError


def _check_first_record(line: RawRecord, text_field: str, limit: int, shard: Shard, place: str) -> None:
    """Errors: UserError if it has no text_field, or shows that lines are no records here."""
    try:
        fields = _parse_json_object(line, limit)
    except RecordError:
        if line is not None:
            check_one_record_per_line(line, shard.place)
        return
    if text_field not in fields:
        raise missing_field_error(text_field, list(fields), place)


def _parse_json_object(line: RawRecord, limit: int) -> dict[str, Any]:
    """The JSON object of a line. Errors: RecordError."""
    try:
        value = json.loads(decode_utf8(line, limit + 1).removeprefix("\ufeff"))  # the one more is the line's end
    except (ValueError, RecursionError) as error:
        raise RecordError(f"the line is not JSON: {exception_message(error)}") from None
    if not isinstance(value, dict):
        raise RecordError(f"the line is no JSON object, but {type(value).__name__}")
    return value
