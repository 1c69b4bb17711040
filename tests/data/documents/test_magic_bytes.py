"""Files that are not what their suffix says."""

from pathlib import Path

import pytest

from tests.data.documents.reading import LINES_OF_TWO, compressed, problem, texts


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


@pytest.mark.parametrize(
    "raw", [b"a\0b", b"text" + b"\0" * 5000, b"\0" * 5000, b"\x01\x02\x03" * 30, b"\t\n" * 40, b"\0a"]
)
def test_control_characters_alone_do_not_make_a_text_wide(raw: bytes):
    assert texts("a.txt", raw) == [raw.decode()]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_pointer_is_refused_wherever_it_is_read(name: str):
    lfs = b"version https://git-lfs.github.com/spec/v1\next-0-x sha256:1\noid sha256:%064d\nsize 5\n" % 7
    assert "the file is a pointer of Git LFS, not the file itself" in problem(name, lfs)
    assert "`git annex get`" in problem(name, b"../.git/annex/objects/X/Y/SHA256E-s5--1.txt")
