"""Records of .parquet: the rows of the column that is asked for, and only its row groups."""

import io
import random

import pyarrow as pa
import pyarrow.parquet as pq

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.readers import read_records
from smoltrain.data.documents.records import BadRecord, BrokenFile, Document
from tests.data.documents.reading import parquet, problem, records, shard_of, texts


def test_parquet_reads_the_column_asked_for():
    rows = [f"text {i}" for i in range(3000)]
    found = records("a.parquet", parquet(700, n=range(3000), body=rows), text_field="body")
    assert found == [Document(f"a.parquet:{i + 1}", i, row) for i, row in enumerate(rows)]


def test_bad_rows_keep_their_numbers():
    broken = pa.StringArray.from_buffers(
        5, pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 2, 2, 4))), pa.py_buffer(b"a\xffbc"),
        pa.py_buffer(bytes([0b11011])),
    )  # fmt: skip
    one, not_utf8, null, empty, five = records("a.parquet", parquet(text=broken))
    assert (one, five) == (Document("a.parquet:1", 0, "a"), Document("a.parquet:5", 4, "bc"))
    bad = [(2, not_utf8, "the text is not UTF-8"), (3, null, "no text, but null"), (4, empty, "the text is empty")]
    for number, record, why in bad:
        assert isinstance(record, BadRecord)
        assert (record.place, record.record) == (f"/data/a.parquet, row {number}", number - 1)
        assert why in record.why


def test_a_column_that_is_not_text():
    assert "the field 'text' is not text: saw int64, want a string" in problem("a.parquet", parquet(text=[1]))
    assert "saw list<" in problem("a.parquet", parquet(text=[["a"]]))


def test_row_groups_before_the_first_record_are_not_read():
    raw = parquet(1000, text=[random.Random(i).randbytes(450).hex() for i in range(10_000)])
    asked: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            found = super().read(size)
            asked.append(len(found))
            return found

    def some_of(first: int, stride: int) -> int:
        asked.clear()
        source, slice_ = SourceSection(path="/data"), {"first": first, "stride": stride, "max_document_mib": 50}
        found = list(read_records(shard_of("a.parquet", raw), source, **slice_, opener=lambda shard: Counted(raw)))
        assert [record.record for record in found] == list(range(first, 10_000, stride))
        return sum(asked)

    whole = some_of(0, 1)
    assert some_of(9_500, 1) < whole / 5
    assert some_of(500, 5_000) < whole / 3


def test_parquet_without_rows_is_a_bad_record():
    for raw in (parquet(text=pa.array([], pa.string())), b""):
        assert records("a.parquet", raw) == [BadRecord("/data/a.parquet", 0, "the file is empty")]
        assert records("a.parquet", raw, first=1) == []


def test_unreadable_parquet():
    assert "cannot be read as parquet" in problem("a.parquet", b"PAR1 this is no parquet file PAR1", BrokenFile)
    whole = parquet(text=["hello"] * 1000)
    assert "cannot be read as parquet" in problem("a.parquet", whole[: len(whole) // 2], BrokenFile)


def test_columns_of_one_name_are_refused():
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    line = problem("a.parquet", file.getvalue())
    assert line.startswith("there are several columns 'text': saw 2 of them, want one; or another field")


def test_a_column_with_a_dot_in_its_name_is_not_the_field_of_another():
    nested = pa.array([{"text": "no"}])
    for columns in ({"meta.text": ["yes"], "meta": nested}, {"meta": nested, "meta.text": ["yes"]}):
        assert texts("a.parquet", parquet(**columns), text_field="meta.text") == ["yes"]
