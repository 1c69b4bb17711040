"""Every format: which records a shard has, any slice of them, and what stands where one is bad."""

import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents import decompress
from smoltrain.data.documents.read_text import NOT_UTF8_BUT_WIDE
from smoltrain.data.documents.readers import read_records
from smoltrain.data.documents.records import BadRecord, BrokenFile, Document, Record
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import UserError
from tests.data.documents.files import list_shards

ZSTD_FRAMES = (
    "28b52ffd04586100007b2274657874223a20226f6e391f0b4c"
    "28b52ffd0458a1000065227d0a7b2274657874223a202274776f227d0a7cb23db5"
)
MIB = 2**20


def shard_of(name: str, raw: bytes) -> Shard:
    return Shard(name, f"/data/{name}", len(raw), "size only")


def records(name: str, raw: bytes, *, first: int = 0, stride: int = 1, mib: float = 50, **more: Any) -> list[Record]:
    """What is read of a file with that name and those bytes."""
    source = SourceSection.model_validate({"path": "/data", **more})
    slice_ = {"first": first, "stride": stride, "max_document_mib": mib}
    return list(
        read_records(shard_of(name, raw), source, **slice_, opener=lambda shard: io.BufferedReader(io.BytesIO(raw)))
    )


def texts(name: str, raw: bytes, **more: Any) -> list[str]:
    found = records(name, raw, **more)
    assert not [record for record in found if isinstance(record, BadRecord)]
    return [record.text for record in found if isinstance(record, Document)]


def problem(name: str, raw: bytes, kind: type[UserError] = UserError, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        records(name, raw, **more)
    assert type(caught.value) is kind
    (only,) = caught.value.problems
    assert "\n" not in str(only)
    assert not {"", "None"} & {only.what, only.saw, only.want, only.change}
    return str(only)


def compressed(raw: bytes, suffix: str) -> bytes:
    match suffix.lower():
        case ".gz":
            return gzip.compress(raw)
        case ".zst":
            return zstandard.ZstdCompressor().compress(raw)
    return raw


def jsonl(*fields: object) -> bytes:
    return "".join(json.dumps(f) + "\n" for f in fields).encode()


def parquet(row_group_size: int | None = None, **columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return file.getvalue()


# ---- any slice of anything

PIECES = st.sampled_from(
    ["one", "zwö", "", " ", "\n", "\r\n", "\n\n", "\n \n", "<|", "|>", "<|endoftext|>", "\u2028", "𝄞"]
)
TEXT = st.lists(PIECES, max_size=8).map("".join)
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


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=100, deadline=None)
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


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(TEXT, max_size=8),
    separator=st.sampled_from(["<|endoftext|>", "\n", "aba", "ä"]),
    block=st.integers(1, 9),
)
def test_separated_parts_are_those_of_split(parts: list[str], separator: str, block: int):
    text = separator.join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompress, "BLOCK", block)
        found = records("a.txt", text.encode(), documents="separator", document_separator=separator)
    expected = [part.strip("\r\n") for part in text.split(separator) if part.encode().strip()]
    if expected:
        assert found == [Document(f"a.txt:{i + 1}", i, part) for i, part in enumerate(expected)]
    else:
        assert found == [BadRecord("/data/a.txt", 0, "the file is empty")]


# ---- .txt and .md


def test_a_text_file_is_one_document_down_to_its_line_ends():
    assert records("a.txt", "ä\r\nb\n".encode()) == [Document("a.txt", 0, "ä\r\nb\n")]
    assert records("a.txt", b"x" * MIB, mib=0.1) == [Document("a.txt", 0, "x" * MIB)]  # of any length
    assert records("a.txt", b"x", first=1) == []


def test_a_text_file_is_cut_at_blank_lines():
    raw = b"\n\none\r\ntwo\r\n \r\nthree\n\n\n\t\n  four\n"
    found = [("a.md:1", 0, "one\r\ntwo"), ("a.md:2", 1, "three"), ("a.md:3", 2, "  four")]
    assert records("a.md", raw, documents="blank_lines") == [Document(*each) for each in found]


def test_a_text_file_is_cut_at_a_separator():
    raw = b"<|endoftext|>\none\n\n<|endoftext|>two<|endoftext|>\n \n<|endoftext|>three\n<|endoftext|>\n"
    assert texts("a.txt", raw, documents="separator") == ["one", "two", "three"]
    assert texts("a.txt", b"one---two", documents="separator", document_separator="---") == ["one", "two"]


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


def test_text_that_is_not_utf8_is_a_bad_record_with_its_place():
    raw = b"one\ntwo\n\xff\n\nfour"
    (bad,) = records("a.txt", raw)
    assert isinstance(bad, BadRecord)
    assert (bad.place, bad.record) == ("/data/a.txt:3", 0)
    assert bad.why.startswith("the text is not UTF-8: 'utf-8' codec can't decode byte 0xff")
    bad, four = records("a.txt", raw, documents="blank_lines")
    assert isinstance(bad, BadRecord)
    assert (bad.place, bad.record) == ("/data/a.txt, part 1", 0)
    assert four == Document("a.txt:2", 1, "four")


# ---- .jsonl


def test_jsonl_numbers_its_lines_and_passes_over_blank_ones():
    raw = b'{"text": "one\\u2028two", "n": 1}\n\n \r\n{"text": "four"}\r\n{"text": "five"}'
    found = [("a.jsonl:1", 0, "one\u2028two"), ("a.jsonl:4", 3, "four"), ("a.jsonl:5", 4, "five")]
    assert records("a.jsonl", raw) == [Document(*each) for each in found]
    assert [record.record for record in records("a.jsonl", raw, first=1, stride=2)] == [3]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": ', "the line is not JSON: Expecting value"),
        (b"[" * 100_000, "the line is not JSON"),
        (b"[1, 2]", "the line is no JSON object, but list"),
        (b"3", "the line is no JSON object, but int"),
        (b'{"n": 3}', "the field 'text' is no text, but missing"),
        (b'{"text": null}', "the field 'text' is no text, but null"),
        (b'{"text": 3}', "the field 'text' is no text, but a int"),
        (b'{"text": ""}', "the text is empty"),
        (b'{"text": "\\ud800"}', "the text is not UTF-8"),
        (b'{"text": "\xff"}', "the text is not UTF-8"),
        (b'{"text": "' + b"x" * MIB + b'"}', "longer than data.max_document_mib = 1"),
    ],
)
def test_a_bad_line_keeps_its_number_and_the_others_theirs(line: bytes, why: str):
    raw = jsonl({"text": "one"}) + line + b"\n" + jsonl({"text": "three"})
    one, bad, three = records("a.jsonl", raw, mib=1)
    assert (one, three) == (Document("a.jsonl:1", 0, "one"), Document("a.jsonl:3", 2, "three"))
    assert isinstance(bad, BadRecord)
    assert (bad.place, bad.record) == ("/data/a.jsonl:2", 1)
    assert bad.why.startswith(why)
    assert "\n" not in bad.why


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


# ---- .parquet


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


# ---- files that are broken as a whole


def test_unreadable_parquet():
    assert "cannot be read as parquet" in problem("a.parquet", b"PAR1 this is no parquet file PAR1", BrokenFile)
    whole = parquet(text=["hello"] * 1000)
    assert "cannot be read as parquet" in problem("a.parquet", whole[: len(whole) // 2], BrokenFile)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_compressed_file_names_the_place(suffix: str):
    lines = b"".join(b'{"text": "%032x"}\n' % (i * 2**64 // 7) for i in range(20_000))
    whole = compressed(lines, suffix)
    line = problem(f"a.jsonl{suffix}", whole[: len(whole) // 2], BrokenFile)
    assert "the file cannot be decompressed" in line
    assert f"want a whole {suffix} file" in line
    assert 1000 < int(line.rpartition(f"a.jsonl{suffix}:")[2]) < 19_000  # zstd gives up a whole block of 128 KiB
    assert problem(f"a.jsonl{suffix}", lines, BrokenFile).endswith(f"a.jsonl{suffix}:1")
    assert problem(f"a.txt{suffix}", lines, BrokenFile).endswith(f"a.txt{suffix}")
    assert problem(f"a.txt{suffix}", lines, BrokenFile, documents="separator").endswith(f"a.txt{suffix}, part 1")
    assert "the file cannot be decompressed" in problem(f"a.txt{suffix}", whole + b"rest", BrokenFile)


def test_what_zstd_and_gzip_themselves_write_in_several_frames():
    """Two frames, as `cat a.zst b.zst` or a parallel compressor makes; the zstd ones were written by zstd 1.5.4."""
    assert texts("a.jsonl.zst", bytes.fromhex(ZSTD_FRAMES)) == ["one", "two"]
    frames = gzip.compress(b'{"text": "on') + gzip.compress(b'e"}\n{"text": "two"}\n')
    assert texts("b.jsonl.gz", frames) == ["one", "two"]


def test_a_file_that_the_system_refuses_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("secret")
    source = SourceSection(path=str(tmp_path))
    (shard,) = list_shards(source)

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"the file cannot be read: saw .*Permission denied"):
        list(read_records(shard, source, max_document_mib=1))


# ---- what is no file of its kind

LINES_OF_TWO = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".jsonl.gz", ".json.zst"])
@pytest.mark.parametrize(
    ("raw", "saw", "how"),
    [
        (b'[{"text": "one"}, {"text": "two"}]', "one JSON document, an array", "jq -c '.[]'"),
        (b'\n\xef\xbb\xbf [\n{"text": "one"},\n{"text": "two"}\n]'[1:], "one JSON document, an array", "jq -c '.[]'"),
        (b"[]\n", "one JSON document, an array", "jq -c '.[]'"),
        (b'{\n  "text": "one"\n}\n', "one JSON document over several lines", "jq -c"),
        (b'{"version": 1,\n "data": [\n  {"text": "one"}]}', "one JSON document over several lines", "jq -c"),
        (b'{"data": [\r\n  {"text": "one"}\r\n]}', "one JSON document over several lines", "jq -c"),
        (LINES_OF_TWO.replace(b"\n", b"\r"), "lines that end in CR alone", r"tr '\r' '\n'"),
        (LINES_OF_TWO.replace(b"one", b"one" * 9000).replace(b"\n", b"\r"), "lines that end in CR alone", "tr"),
        (LINES_OF_TWO.replace(b"\n", b""), "several records on one line", "jq -c ."),
    ],
)
def test_json_that_is_not_lines_is_refused(suffix: str, raw: bytes, saw: str, how: str):
    name = f"a{suffix}"
    packed = compressed(raw, Path(name).suffix)
    for first, stride in ((0, 1), (3, 2)):
        line = problem(name, packed, first=first, stride=stride)
        assert line.startswith(f"the file holds no JSON Lines: saw {saw}, want one record per line, as `{how}")
        assert line.endswith(f"change /data/{name}")


@pytest.mark.parametrize("raw", [b'{"text": "on\n', b"{\n", b'{"text": \n', b"{]\n", b'{"text": "{} {}\n'])
def test_a_first_line_that_is_cut_is_a_bad_record(raw: bytes):
    bad, *good = records("a.jsonl", raw + LINES_OF_TWO)
    assert isinstance(bad, BadRecord)
    assert len(good) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("words", ["the king of Naples spoke", "король Неаполя говорил"])
def test_texts_of_wide_characters_are_named(encoding: str, words: str):
    raw = f"{words}\n\n{words}\n".encode(encoding)
    for documents in ("file", "blank_lines", "separator"):
        (only,) = records("a.txt", raw, documents=documents)
        assert only == BadRecord("/data/a.txt", 0, NOT_UTF8_BUT_WIDE)
    lines = "".join(json.dumps({"text": words}, ensure_ascii=False) + "\n" for _ in range(3))
    line = problem("a.jsonl", lines.encode(encoding))
    assert "the file is not UTF-8: saw UTF-16 or UTF-32, want `iconv" in line


@pytest.mark.parametrize(
    "raw", [b"a\0b", b"text" + b"\0" * 5000, b"\0" * 5000, b"\x01\x02\x03" * 30, b"\t\n" * 40, b"\0a"]
)
def test_control_characters_alone_do_not_make_a_text_wide(raw: bytes):
    assert texts("a.txt", raw) == [raw.decode()]


def test_a_window_of_two_gigabytes_is_read():
    """As `zstd --long=31` asks for; the frame's header is made to say so."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    raw = bytearray(writer.compress(LINES_OF_TWO) + writer.flush())
    assert zstandard.get_frame_parameters(bytes(raw)).window_size == 2**27
    raw[5] = (31 - 10) << 3
    assert zstandard.get_frame_parameters(bytes(raw)).window_size == 2**31
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    for frames, expected in ((raw, 1), (raw * 3, 3), (skippable + raw + skippable + bytes.fromhex(ZSTD_FRAMES), 2)):
        assert texts("a.jsonl.zst", bytes(frames)) == ["one", "two"] * expected
    assert "saw it ends within a frame" in problem("a.jsonl.zst", bytes(raw[:-3]), BrokenFile)


def test_a_bomb_of_zstd_comes_out_piece_by_piece():
    raw = zstandard.compress(b"\0" * 100 * MIB)
    tracemalloc.start()
    (bad,) = records("a.jsonl.zst", raw, mib=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(bad, BadRecord)
    assert peak < 80 * MIB


def test_columns_of_one_name_are_refused():
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    line = problem("a.parquet", file.getvalue())
    assert line.startswith("there are several columns 'text': saw 2 of them, want one; or another field")


def test_a_column_with_a_dot_in_its_name_is_not_the_field_of_another():
    nested = pa.array([{"text": "no"}])
    for columns in ({"meta.text": ["yes"], "meta": nested}, {"meta": nested, "meta.text": ["yes"]}):
        assert texts("a.parquet", parquet(**columns), text_field="meta.text") == ["yes"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_pointer_is_refused_wherever_it_is_read(name: str):
    lfs = b"version https://git-lfs.github.com/spec/v1\next-0-x sha256:1\noid sha256:%064d\nsize 5\n" % 7
    assert "the file is a pointer of Git LFS, not the file itself" in problem(name, lfs)
    assert "`git annex get`" in problem(name, b"../.git/annex/objects/X/Y/SHA256E-s5--1.txt")


def test_what_is_empty_is_told_apart_from_what_is_bad():
    found = records("a.jsonl", jsonl({"text": ""}, {"text": None}, {"no": 1}, {"text": 3}))
    assert [record.empty for record in found if isinstance(record, BadRecord)] == [True, True, False, False]
    rows = records("a.parquet", parquet(text=["a", "", None]))
    assert [record.empty for record in rows if isinstance(record, BadRecord)] == [True, True]
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (only,) = records(name, b"")
        assert isinstance(only, BadRecord)
        assert only.empty
    (wrong,) = records("a.txt", b"\xff")
    assert isinstance(wrong, BadRecord)
    assert not wrong.empty
