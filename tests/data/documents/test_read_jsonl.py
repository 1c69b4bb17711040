"""Records of .jsonl: which lines are records, and what stands where one is bad."""

import gzip
from pathlib import Path

import pytest
import zstandard

from smoltrain.data.documents.records import BadRecord, Document
from tests.data.documents.reading import LINES_OF_TWO, MIB, jsonl, records
from tests.data.documents.texts import both, lines, prepared_of, text


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


@pytest.mark.parametrize("raw", [b'{"text": "on\n', b"{\n", b'{"text": \n', b"{]\n", b'{"text": "{} {}\n'])
def test_a_first_line_that_is_cut_is_a_bad_record(raw: bytes):
    bad, *good = records("a.jsonl", raw + LINES_OF_TWO)
    assert isinstance(bad, BadRecord)
    assert len(good) == 2


def test_ndjson_is_jsonl_by_another_name(root: Path):
    for path in (root / "source").iterdir():
        path.unlink()
    (root / "source" / "a.ndjson").write_text(lines(0, 1, 2, 3))
    (root / "source" / "b.ndjson.gz").write_bytes(gzip.compress(lines(4, 5, 6).encode()))
    (root / "source" / "c.NDJSON.zst").write_bytes(zstandard.compress(lines(7, 8, 9).encode()))
    assert sorted(both(prepared_of(root))) == [text(i) for i in range(10)]
