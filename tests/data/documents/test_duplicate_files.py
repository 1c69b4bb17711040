"""A file under several names is read once."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from smoltrain.data.documents.find_files import find_source_files
from smoltrain.data.documents.folders import REPEATED_FOLDERS
from smoltrain.data.documents.shard import Shard
from tests.data.documents.files import at, names
from tests.data.documents.texts import both, lines, prepared_of, text
from tests.data.tokens.test_tokenise import given


def listed(folder: Path, **changes: Any) -> Any:
    from smoltrain.data.documents.listing import list_all_sources

    return list_all_sources(given(folder, data__path=str(folder), **changes))["data"]


def test_a_file_beside_its_own_compression_is_read_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(lines(1, 2))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(1, 2).encode()))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(1, 2).encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(3).encode()))
    (tmp_path / "c.jsonl").touch()  # what a decompressor that was stopped leaves
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines(4).encode()))
    listing = listed(tmp_path)
    assert [shard.name for shard in listing.shards] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    assert listing.exclusion_notes == (
        "the same file of data is read once: "
        "a.jsonl.gz (is a.jsonl), a.jsonl.zst (is a.jsonl), c.jsonl (is c.jsonl.zst)",
    )


def test_over_links_a_file_is_read_once(tmp_path: Path):
    (tmp_path / "z" / "deep").mkdir(parents=True)
    (tmp_path / "z" / "deep" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "again").symlink_to(tmp_path / "z")  # comes first by its name
    (tmp_path / "z" / "round").symlink_to(tmp_path)
    (tmp_path / "z" / "deep" / "itself").symlink_to(".")
    (tmp_path / "a-link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "c.txt").hardlink_to(tmp_path / "b.txt")
    assert names(tmp_path) == ["a-link.txt", "b.txt", "c.txt", "z/deep/a.txt"]
    assert [shard.name for shard in listed(tmp_path).shards] == ["b.txt", "z/deep/a.txt"]
    assert find_source_files(at(tmp_path)).unread == {REPEATED_FOLDERS: 3}
    (tmp_path / "z" / "round").unlink()
    assert names(tmp_path, pattern="again/**/*.txt") == ["again/deep/a.txt"]
    assert names(tmp_path / "*" / "deep" / "*.txt") == ["again/deep/a.txt", "z/deep/a.txt"]


def test_behind_a_url_a_file_is_read_once():
    from smoltrain.data.documents.duplicate_files import remove_duplicate_files

    shards = [Shard(name, f"s3://bucket/{name}", 5, "size only") for name in ("a.txt", "a.txt.zst", "b.txt")]
    kept, left = remove_duplicate_files(shards)
    assert [shard.name for shard in kept] == ["a.txt", "b.txt"]
    assert left == ["a.txt.zst (is a.txt)"]


def test_two_fields_of_one_file_are_two_texts(root: Path):
    table = pa.table({"text": [text(i) for i in range(9)], "more": [text(i) for i in range(20, 29)]})
    pq.write_table(table, root / "a.parquet")
    parts = [
        {"name": field, "path": str(root / "a.parquet"), "text_field": field, "weight": 1.0}
        for field in ("text", "more")
    ]
    prepared = prepared_of(root, data__path=None, data__sources=parts)
    assert set(both(prepared, 1)) == {text(i) for i in range(20, 29)}
