"""Documents of any file: text as it is, cut without losing a character; what is no text is refused, not left out."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from smoltrain.errors import UserError
from smoltrain.evaluation import read_text
from smoltrain.evaluation.read_text import read_file_documents


def read(path: Path) -> list[str]:
    return ["".join(pieces) for pieces in read_file_documents(path, "text")]


def test_a_text_comes_in_pieces_that_make_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_text, "BLOCK_BYTES", 7)  # cuts within characters
    monkeypatch.setattr(read_text, "PIECE_CHARACTERS", 20)
    text = "Grüße, ihr Bäume!\r\nUnd 世界 auch.  " * 9
    (tmp_path / "plain.log").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("plain.log", "packed.txt.gz"):
        [pieces] = read_file_documents(tmp_path / name, "text")
        found = list(pieces)
        assert "".join(found) == text
        assert len(found) > 5


def test_a_long_text_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_text, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(read_text, "PIECE_CHARACTERS", 2**14)
    path = tmp_path / "long.txt"
    path.write_text("the king of Naples met the queen\n" * 2**17)
    [pieces] = read_file_documents(path, "text")
    tracemalloc.start()
    try:
        num_characters = sum(len(piece) for piece in pieces)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_characters == path.stat().st_size > 4 * 2**20
    assert peak < 2**20


def test_records_are_documents_each(tmp_path: Path) -> None:
    lines = [{"text": "one"}, {"text": ""}, {"text": "two"}]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine \xff not", "the file is no text: saw 'utf-8' codec can't decode byte 0xff"),
        ("a.txt", b"cut \xc3", "the file is no text"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 3}\n', "a record is no text: saw the field 'text' is no text"),
        ("a.jsonl", b'{"content": "one"}\n', "the text field is missing"),
        ("a.txt.gz", b"no gzip at all", "the file cannot be decompressed"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="this is no file"):
        read(tmp_path)
