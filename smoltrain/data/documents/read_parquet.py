"""Records of .parquet: the rows of one column of text."""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents import decompress
from smoltrain.data.documents.decompress import is_system_error
from smoltrain.data.documents.records import (
    BrokenFile,
    Document,
    EmptyFileError,
    Record,
    RecordError,
    decode_utf8,
    extract_text,
    missing_field_error,
)
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import Problem, UserError, exception_message

PARQUET_BATCH_ROWS = 128  # rows that are made into text at once


def read_parquet_records(
    shard: Shard, file: BinaryIO, source: SourceSection, wanted: range, limit: int
) -> Iterator[Record]:
    """The wanted rows; row groups without one are not read.

    Errors: UserError if text_field is no column of text; BrokenFile if the file makes no sense.
    """
    text_field = source.text_field
    try:
        # Without pre_buffer, as row groups may be huge.
        with pq.ParquetFile(file, buffer_size=decompress.BLOCK, pre_buffer=False) as table:
            _check_text_column(table.schema_arrow, text_field, shard.place)
            begin = 0
            for group in range(table.num_row_groups):
                end = begin + table.metadata.row_group(group).num_rows
                if _clip_range(wanted, begin, end):
                    for batch in table.iter_batches(PARQUET_BATCH_ROWS, [group], [text_field], use_threads=False):
                        column = batch.column(batch.schema.names.index(text_field))  # "a.b" brings the b of a along
                        yield from _read_batch(shard, column, text_field, begin, wanted, limit)
                        begin += batch.num_rows
                begin = end
            if begin == 0:
                raise EmptyFileError
    except (pa.ArrowException, OSError) as error:
        if is_system_error(error):
            raise
        what, want = "the file cannot be read as parquet", "a whole parquet file"
        raise BrokenFile(Problem(what, exception_message(error), want, shard.place)) from None


def count_parquet_rows(file: BinaryIO) -> int:
    """Those of all row groups, as the file's footer tells. The file stays open."""
    return int(pq.read_metadata(file).num_rows)


def _check_text_column(schema: pa.Schema, text_field: str, place: str) -> None:
    """Errors: UserError unless exactly one column has that name, and holds text."""
    change = f"data.text_field, or {place}"
    num_columns = schema.names.count(text_field)
    if num_columns == 0:
        raise missing_field_error(text_field, schema.names, place)
    if num_columns > 1:
        what = f"there are several columns {text_field!r}"
        raise UserError(Problem(what, f"{num_columns} of them", "one; or another field", change))
    kind = schema.field(text_field).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
        raise UserError(Problem(f"the field {text_field!r} is not text", str(kind), "a string", change))


def _clip_range(wanted: range, begin: int, end: int) -> range:
    """Those of the wanted records that are at least begin and less than end."""
    start = begin + (wanted.start - begin) % wanted.step if begin > wanted.start else wanted.start
    return range(start, end, wanted.step)


def _read_batch(
    shard: Shard, column: pa.Array, text_field: str, begin: int, wanted: range, limit: int
) -> Iterator[Record]:
    """The wanted ones of some rows, the first of which is number `begin`."""
    records = _clip_range(wanted, begin, begin + len(column))
    if not records:
        return
    if not pa.types.is_string(column.type):
        column = column.cast(pa.large_string())
    if wanted.step == 1:
        column = column[records.start - begin :]
    else:
        column = column.take(pa.array([record - begin for record in records]))
    for record, text in zip(records, _decode_column(column, text_field, limit), strict=True):
        if isinstance(text, RecordError):
            yield text.as_record(f"{shard.place}, row {record + 1}", record)
        else:
            yield Document(f"{shard.name}:{record + 1}", record, text)


def _decode_column(column: pa.Array, text_field: str, limit: int) -> list[str | RecordError]:
    """The texts of a column, or why one is bad; made into Python's all at once unless one of them is."""
    sizes = pc.call_function("min_max", [pc.call_function("binary_length", [column])]).as_py()
    if not column.null_count and sizes["min"] > 0 and sizes["max"] <= limit:
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            pass  # the loop below finds out which one is not UTF-8
    texts: list[str | RecordError] = []
    for value in column:
        try:
            texts.append(_decode_value(value, text_field, limit))
        except RecordError as error:
            texts.append(error)
    return texts


def _decode_value(value: pa.Scalar, text_field: str, limit: int) -> str:
    """Errors: RecordError."""
    if not value.is_valid:
        return extract_text({text_field: None}, text_field)
    buffer = value.as_buffer()
    raw = buffer.to_pybytes() if len(buffer) <= limit else None
    return extract_text({text_field: decode_utf8(raw, limit)}, text_field)
