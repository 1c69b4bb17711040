"""None that is held out is trained on, and no file by two sources: all of it is said."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from tests.data.documents.texts import config, prepared_of, sides, text
from tests.data.tokens.test_tokenise import problem, split


@pytest.mark.parametrize("mode", ["cached", "stream"])
@pytest.mark.parametrize("how", ["itself", "over a link", "by a hard link", "compressed", "by a glob"])
def test_a_held_out_file_within_the_folder_is_not_trained_on(root: Path, mode: str, how: str, capsys: Any):
    place = root / "source" / "valid.txt"
    place.write_text(text(77))
    held = place
    match how:
        case "over a link":
            (root / "link").symlink_to(root / "source")
            held = root / "link" / "valid.txt"
        case "by a hard link":
            held = root / "elsewhere.txt"
            held.hardlink_to(place)
        case "compressed":
            place.rename(place := root / "source" / "valid.txt.gz")
            place.write_bytes(gzip.compress(text(77).encode()))
            held = root / "source" / "valid.txt"
            held.write_text(text(77))
        case "by a glob":
            held = root / "source" / "val*"
    prepared = prepared_of(root, mode, data__validation_path=str(held))
    assert split(prepared, prepared.validation[0]) == [text(77)]
    if mode == "cached":
        assert sides(prepared)[0] == [text(i) for i in range(12)]
    else:
        assert [shard.name for shard in prepared.shards[0]] == [f"{i:02}.txt" for i in range(12)]
    said = capsys.readouterr().out
    assert said.count("held out, so not trained on: valid.txt") == 1
    again = prepared_of(root, mode, data__validation_path=str(held))
    assert again.index == prepared.index
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_a_file_that_one_source_holds_out_is_not_trained_on_by_another(root: Path, mode: str):
    (root / "more").mkdir()
    for i in range(20, 26):
        (root / "more" / f"{i}.txt").write_text(text(i))
    parts = [
        {"name": "a", "path": str(root / "source"), "weight": 1.0},
        {
            "name": "b",
            "path": str(root / "more"),
            "validation_path": str(root / "source" / "0[0-4].txt"),
            "weight": 1.0,
        },
    ]
    prepared = prepared_of(root, mode, data__path=None, data__sources=parts, data__validation_share=0.4)
    files: Any = prepared.index.fingerprint.sources
    assert sorted(files["a"]["files"]) == [f"{i:02}.txt" for i in range(5, 12)]
    assert sorted(files["b"]["validation_files"]) == [f"{i:02}.txt" for i in range(5)]


def test_of_two_sources_that_name_one_file_the_first_reads_it(root: Path, capsys: Any):
    parts = [
        {"name": "some", "path": str(root / "source" / "0*"), "weight": 1.0},
        {"name": "all", "path": str(root / "source"), "weight": 1.0},
    ]
    prepared = prepared_of(root, data__path=None, data__sources=parts)
    assert sorted(sides(prepared, 0)[0] + sides(prepared, 0)[1]) == [text(i) for i in range(10)]
    assert "10 files of all are read for a source named before it: 00.txt, 01.txt, 02.txt and 7 more" in (
        capsys.readouterr().out
    )
    both = [part | {"path": str(root / "source")} for part in parts]
    line = problem(config(root, run__name="b", data__path=None, data__sources=both))
    assert line.startswith("the source 'all' has no file to train on: saw 12 files of all are read for a source named")
    assert line.endswith("change data.sources.all.path or validation_path")


def test_what_is_not_read_stands_in_the_line_about_the_data(root: Path):
    for name in ("a.csv", "b.CSV", "c.arrow", "d.jsonl.xz", "Makefile", "README.md", "LICENSE", "dataset_infos.json"):
        (root / "source" / name).write_text("x")
    for mode in ("cached", "stream"):
        prepared = prepared_of(root, mode, run__name=mode)
        assert prepared.describe().endswith(
            "; not read: 1 .arrow, 2 .csv, 1 .xz, 2 cards and licences, 1 notes of datasets, 1 without a suffix"
        )
    assert sum(len(side) for side in sides(prepared_of(root))) == 12
