"""What is found out about the files of a text, and how much of it there is."""

import gzip
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from smoltrain.config.schema import DataSection
from smoltrain.data.documents import decompress
from smoltrain.errors import UserError
from smoltrain.new_recipe import sample as samples
from smoltrain.new_recipe.sample import TextSample, sample_text
from tests.faulty_server import FaultyServer
from tests.new_recipe.texts import make_wish, study_large_text, write_texts

SEPARATOR = "<|endoftext|>"


def sample(path: Path) -> TextSample:
    return sample_text(DataSection(path=str(path)))


def test_a_small_text_is_read_whole(tmp_path: Path):
    folder = write_texts(tmp_path / "texts")
    found = sample(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert found.is_whole
    assert (found.num_bytes, found.total_bytes, found.num_files, len(found.documents)) == (size, size, 20, 20)
    assert found == sample(folder), "equal files, equal answers"


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_the_amount_of_a_large_text_is_estimated_from_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 60_000)
    monkeypatch.setattr(samples, "SHARD_BYTES", 15_000)
    whole = [path.read_text() for path in sorted(write_texts(tmp_path / "own", 30, 100).iterdir())]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(10):
        records = [json.dumps({"id": 0, "text": f"{i} {text[:500]}"}) for text in whole for _ in range(10)]
        content = ("\n".join(whole) if suffix == "txt" else "\n".join(records)).encode()
        (folder / f"{i}.{suffix}").write_bytes(content)
    found = sample(folder)
    assert not found.is_whole
    assert found.num_bytes <= 60_000 + 15_500
    size = 10 * (len("\n".join(whole)) if suffix == "txt" else 300 * 502)
    assert found.total_bytes == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("rows_of_a_group", [50, 10_000])
def test_the_amount_of_large_tables_is_estimated_by_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_of_a_group: int
):
    """A place in the file says little: columns lie behind each other, and are read in blocks."""
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 60_000)
    monkeypatch.setattr(samples, "SHARD_BYTES", 15_000)
    rng = random.Random(0)
    size = 0
    for i in range(6):
        rows = [rng.randbytes(rng.randint(100, 300)).hex() for _ in range(500)]
        table = pa.table({"before": [rng.random() for _ in rows], "text": rows, "behind": [rng.random() for _ in rows]})
        pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=rows_of_a_group)
        size += sum(map(len, rows))
    found = sample(tmp_path)
    assert not found.is_whole
    assert found.num_bytes < 70_000
    assert found.total_bytes == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(
    ("suffix", "num_files"), [("txt", 1), ("txt.gz", 1), ("txt", 4), ("jsonl.gz", 4), ("jsonl.zst", 4)]
)
def test_what_is_read_ahead_of_the_documents_is_not_counted_as_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, num_files: int
):
    """Parts of a text are cut out of blocks, and decompressors give blocks: the file is read before its documents."""
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 240_000)
    monkeypatch.setattr(samples, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(decompress, "BLOCK", 200_000)
    monkeypatch.setattr(io, "DEFAULT_BUFFER_SIZE", 2**17)  # what gzip reads at once from Python 3.12 on
    rng = random.Random(0)
    size = 0
    for i in range(num_files):
        stories = [rng.randbytes(rng.randint(100, 300)).hex() for _ in range(3000 if num_files == 1 else 1000)]
        lines = [json.dumps({"text": story}) for story in stories]
        raw = (f"\n{SEPARATOR}\n".join(stories) if suffix.startswith("txt") else "\n".join(lines)).encode()
        if suffix.endswith("gz"):
            raw = gzip.compress(raw, 1)
        elif suffix.endswith("zst"):
            raw = zstandard.compress(raw)
        (tmp_path / f"{i}.{suffix}").write_bytes(raw)
        size += sum(map(len, stories))
    found = sample(tmp_path)
    assert not found.is_whole
    assert 240_000 <= found.num_bytes < 250_000
    assert found.total_bytes == pytest.approx(size, rel=0.1)


def test_of_many_long_documents_several_are_in_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 60_000)
    monkeypatch.setattr(samples, "SHARD_BYTES", 15_000)
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"word{i} " * 12_000)
    found = sample(tmp_path)
    assert [len(document.text) for document in found.documents] == [15_000] * 4, "they may be of four languages"
    assert found.total_bytes == 8 * 72_000


def test_a_long_document_is_cut_and_counts_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 60_000)
    monkeypatch.setattr(samples, "SHARD_BYTES", 15_000)
    (tmp_path / "long.txt").write_text("word " * 20_000)
    found = sample(tmp_path)
    assert (found.is_whole, found.num_bytes, found.total_bytes) == (False, 60_000, 100_000), "it is the only file"


def test_files_that_are_held_out_are_counted_apart(tmp_path: Path):
    folder = write_texts(tmp_path / "texts")
    held_out = folder / "019.txt"
    found = sample_text(DataSection(path=str(folder), validation_path=str(held_out)))
    whole = sample(folder)
    assert whole.held_out_bytes is None
    assert found.held_out_bytes == held_out.stat().st_size
    assert (found.num_files, found.total_bytes) == (19, whole.total_bytes - held_out.stat().st_size)
    assert found.notes == ("1 file of data is held out, so not trained on: 019.txt",)


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        ("nowhere.txt", r"the data are missing: saw \S+nowhere.txt, .*; change --validation$"),
        ("empty.txt", r"the data hold no text: saw none in 1 file, want at least one document; change --validation$"),
        ("texts", r"no file to train on: .*; change --data or --validation$"),
    ],
)
def test_what_is_held_out_in_vain(tmp_path: Path, held_out: str, says: str):
    folder = write_texts(tmp_path / "texts")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=says):
        sample_text(DataSection(path=str(folder), validation_path=str(tmp_path / held_out)))


def test_where_the_separator_stands_it_parts_documents(tmp_path: Path):
    path = tmp_path / "stories.txt"
    path.write_text(f"once upon a time\n{SEPARATOR}\nand then\n{SEPARATOR}\nthe end\n")
    found = sample(path)
    assert found.parts_documents
    assert found.notes == (), "what is done already is no advice"
    assert [document.text for document in found.documents] == ["once upon a time", "and then", "the end"]


def test_a_text_behind_a_url_is_parted_too_and_read_while_training():
    stories = f"once upon a time\n{SEPARATOR}\nand then\n{SEPARATOR}\nthe end\n".encode()
    with FaultyServer({"stories.txt": stories}) as server:
        found = sample_text(DataSection(path=server.url("stories.txt")))
    assert (found.parts_documents, found.is_whole, found.is_streamed) == (True, True, True)
    assert [document.text for document in found.documents] == ["once upon a time", "and then", "the end"]


def test_a_separator_in_one_of_many_texts_is_prose(tmp_path: Path):
    folder = write_texts(tmp_path / "texts", 3)
    (folder / "about.txt").write_text(f"a separator is spelled {SEPARATOR}, as here\n")
    found = sample(folder)
    assert not found.parts_documents
    assert found.notes == (
        f"{SEPARATOR!r} stands in about.txt: data.documents=separator would cut the documents there",
    )


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no file matches: saw nothing at"),
        ({"a.txt": "", "b.txt": ""}, "the data hold no text: saw none in 2 files, want at least one document"),
        ({"a.csv": "1,2"}, "no file to read at"),
    ],
)
def test_a_folder_without_text_is_refused(tmp_path: Path, files: dict[str, str], says: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        sample(tmp_path)
    assert says in str(error.value)
    assert str(error.value).endswith("change --data")


@pytest.mark.parametrize(
    ("streamed", "whole", "files", "fields", "cached"),
    [
        (True, False, 3, False, True),
        (False, False, 3, False, False),
        (True, False, 200, False, False),
        (True, False, 3, True, False),
        (True, True, 3, True, True),
        (False, True, 3, True, False),
    ],
)
def test_what_may_be_too_few_documents_to_be_streamed_is_cached(
    streamed: bool, whole: bool, files: int, fields: bool, cached: bool
):
    large = study_large_text(make_wish(20_000_000)).sample
    found = replace(large, num_files=files, is_streamed=streamed, is_whole=whole, all_fields=fields)
    assert found.needs_cached_mode == cached
