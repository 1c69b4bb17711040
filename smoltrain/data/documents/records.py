"""What reading a shard gives: its documents, and what stands in the place of a record that is none."""

from dataclasses import dataclass, field
from typing import Any

from smoltrain.errors import Problem, UserError, exception_message

NOT_UTF8 = "the text is not UTF-8"
RawRecord = bytes | None  # a record's bytes; None where it is longer than allowed, and so was not kept


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


Record = Document | BadRecord


class BrokenFile(UserError):
    """The file as a whole is not what its suffix says."""


class RecordError(Exception):
    """Why a record is bad, in one line."""

    def as_record(self, place: str, record: int) -> BadRecord:
        """The record that it is about."""
        return BadRecord(place, record, str(self), empty=isinstance(self, EmptyRecordError))


class EmptyRecordError(RecordError):
    """There is nothing in it."""


class EmptyFileError(Exception):
    """A file holds no record at all."""


def decode_utf8(raw: RawRecord, limit: int) -> str:
    """The text of a record of at most `limit` bytes. Errors: RecordError."""
    if raw is None or len(raw) > limit:
        raise RecordError(f"longer than data.max_document_mib = {limit / 2**20:g}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{NOT_UTF8}: {exception_message(error)}") from None


def extract_text(fields: dict[str, Any], text_field: str) -> str:
    """The text of a record with fields. Errors: RecordError."""
    value = fields.get(text_field)
    if value is None and text_field in fields:
        raise EmptyRecordError(f"the field {text_field!r} is no text, but null")
    if not isinstance(value, str):
        saw = "missing" if text_field not in fields else f"a {type(value).__name__}"
        raise RecordError(f"the field {text_field!r} is no text, but {saw}")
    if not value:
        raise EmptyRecordError("the text is empty")
    if not value.isascii():
        try:
            value.encode()  # JSON can spell lone surrogates ("\ud800"), which no UTF-8 text contains
        except UnicodeEncodeError as error:
            raise RecordError(f"{NOT_UTF8}: {exception_message(error)}") from None
    return value


def missing_field_error(text_field: str, existing: list[str], place: str) -> UserError:
    """The first record, or the whole file, has no field of that name."""
    want = "one of " + ", ".join(map(repr, existing)) if existing else "records with fields"
    return UserError(Problem("the text field is missing", repr(text_field), want, f"data.text_field, or {place}"))
