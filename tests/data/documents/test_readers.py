"""Every format: any slice of the records of a shard, and what holds for all of them."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents import decompress
from smoltrain.data.documents.readers import read_records
from smoltrain.data.documents.records import BadRecord, Document
from smoltrain.errors import UserError
from tests.data.documents.files import list_shards
from tests.data.documents.reading import MIB, TEXT, compressed, jsonl, parquet, problem, records, texts

BAD_LINES = st.sampled_from(
    [b"{", b"[1]", b'{"text": 3}', b'{"text": null}', b'{"n": 1}', b'{"text": "\xff"}', b"", b" "]
)


LINES = st.lists(st.one_of(TEXT.map(lambda text: json.dumps({"text": text}).encode()), BAD_LINES), max_size=12)


FILES = st.one_of(
    st.tuples(st.sampled_from(["a.jsonl", "a.json"]), LINES.map(lambda lines: b"\n".join([b'{"text": ""}', *lines]))),
    st.tuples(st.sampled_from(["a.txt", "a.md"]), st.one_of(TEXT.map(str.encode), st.binary(max_size=40))),
)


KINDS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]


SLICES = {"first": st.integers(0, 14), "stride": st.integers(1, 6)}


def check_slice(name: str, raw: bytes, first: int, stride: int, **more: Any) -> None:
    all_of_them = records(name, raw, **more)
    numbers = [record.record for record in all_of_them]
    assert numbers == sorted(set(numbers))
    expected = [record for record in all_of_them if record.record in range(first, 10**6, stride)]
    assert records(name, raw, first=first, stride=stride, **more) == expected


@settings(max_examples=300)
@given(file=FILES, suffix=st.sampled_from(["", ".gz", ".zst", ".ZST"]), **SLICES,
       documents=st.sampled_from(["file", "blank_lines", "separator"]), block=st.integers(1, 40))  # fmt: skip
def test_a_slice_is_that_of_all_records(
    file: tuple[str, bytes], suffix: str, first: int, stride: int, documents: str, block: int
):
    name, raw = file[0] + suffix, compressed(file[1], suffix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompress, "BLOCK", block)
        check_slice(name, raw, first, stride, documents=documents)
        plain = records(file[0], file[1], documents=documents)
        assert repr(records(name, raw, documents=documents)).replace(name, file[0]) == repr(plain)


@settings(max_examples=100)
@given(rows=st.lists(st.one_of(TEXT, st.none()), max_size=300), group=st.integers(1, 200), **SLICES,
       kind=st.sampled_from(KINDS))  # fmt: skip
def test_a_slice_of_parquet_is_that_of_its_rows(
    rows: list[str | None], group: int, first: int, stride: int, kind: pa.DataType
):
    raw = parquet(group, n=range(len(rows)), text=pa.array(rows).cast(kind) if rows else pa.array(rows, pa.string()))
    check_slice("a.parquet", raw, first, stride)
    expected = [(i, text) for i, text in enumerate(rows) if text]
    assert [(r.record, r.text) for r in records("a.parquet", raw) if isinstance(r, Document)] == expected
    assert len(records("a.parquet", raw)) == max(len(rows), 1)


@pytest.mark.parametrize("documents", ["file", "blank_lines", "separator"])
def test_a_byte_order_mark_is_not_text(documents: str):
    assert texts("a.md", b"\xef\xbb\xbfhello", documents=documents) == ["hello"]
    assert texts("a.jsonl", b'\xef\xbb\xbf{"text": "hello"}\n') == ["hello"]


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.jsonl", "a.jsonl.zst", "a.json.gz"])
@pytest.mark.parametrize("documents", ["file", "blank_lines", "separator"])
def test_an_empty_file_is_one_bad_record(name: str, documents: str):
    for raw in (b"", compressed(b"", name[-4:].lstrip("d")), compressed(b"", Path(name).suffix)):
        assert records(name, raw, documents=documents) == [BadRecord(f"/data/{name}", 0, "the file is empty")]
        assert records(name, raw, documents=documents, first=2) == []


def test_the_limit_is_met_to_the_byte():
    line = json.dumps({"text": "x" * 1000}).encode()
    for end in (b"", b"\n"):
        assert len(texts("a.jsonl", line + end, mib=len(line) / MIB)) == 1
        (bad,) = records("a.jsonl", line + end, mib=(len(line) - 1) / MIB)
        assert isinstance(bad, BadRecord)
    for documents in ("blank_lines", "separator"):
        assert len(texts("a.txt", b"\n" + line + b"\n", mib=len(line) / MIB, documents=documents)) == 1
        (bad,) = records("a.txt", line + b"\n", mib=(len(line) - 1) / MIB, documents=documents)
        assert isinstance(bad, BadRecord)
    raw = parquet(text=["xä", "x"])
    assert [type(r) for r in records("a.parquet", raw, mib=3 / MIB)] == [Document, Document]
    assert [type(r) for r in records("a.parquet", raw, mib=2 / MIB)] == [BadRecord, Document]


@pytest.mark.parametrize("documents", ["blank_lines", "separator", None])
def test_a_record_of_any_length_is_never_held_whole(documents: str | None, tmp_path: Path):
    """64 MiB in one record, of which 1 MiB is allowed."""
    name = "a.txt.gz" if documents else "a.jsonl.gz"
    path, source = (
        tmp_path / name,
        SourceSection.model_validate({"path": str(tmp_path)} | ({"documents": documents} if documents else {})),
    )
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"x" * 2**19 + (b"y\nx" if documents == "blank_lines" else b"yyx") + b"x" * 2**19)
        file.write(
            {"blank_lines": b"\n\nlast", "separator": b"<|endoftext|>last", None: b'\n{"text": "last"}'}[documents]
        )
    (shard,) = list_shards(source)
    tracemalloc.start()
    bad, last = read_records(shard, source, max_document_mib=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(bad, BadRecord)
    assert bad.why == "longer than data.max_document_mib = 1"
    assert last == Document(f"{name}:2", 1, "last")
    assert peak < 24 * MIB


def test_a_missing_text_field_lists_the_fields_that_exist():
    want = "the text field is missing: saw 'text', want one of 'body', 'id'; change data.text_field, or /data/"
    raw = jsonl({"body": "x", "id": 1}, {"text": "y"})
    assert problem("a.jsonl", raw) == want + "a.jsonl:1"
    assert problem("a.jsonl", b"\n" + raw, first=7, stride=3) == want + "a.jsonl:2"  # whoever looks for another one
    assert problem("b.parquet", parquet(body=["x"], id=[1])) == want + "b.parquet"
    assert "want records with fields" in problem("c.jsonl", jsonl({}))
    assert texts("a.jsonl", raw[: raw.index(b"\n")], text_field="body") == ["x"]


def test_a_file_that_the_system_refuses_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("secret")
    source = SourceSection(path=str(tmp_path))
    (shard,) = list_shards(source)

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"the file cannot be read: saw .*Permission denied"):
        list(read_records(shard, source, max_document_mib=1))
