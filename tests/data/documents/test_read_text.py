"""Records of .txt and .md: whole files and parts of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.data.documents import decompress
from smoltrain.data.documents.read_text import NOT_UTF8_BUT_WIDE
from smoltrain.data.documents.records import BadRecord, Document
from tests.data.documents.reading import MIB, TEXT, problem, records, texts


@settings(max_examples=200)
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
