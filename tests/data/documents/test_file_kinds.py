"""Which files are documents, by their names: cards, notes of tools and others are not."""

from pathlib import Path

import fsspec
import pytest

from smoltrain.data.documents.file_kinds import is_dataset_card
from smoltrain.data.documents.find_files import find_source_files
from smoltrain.errors import UserError
from tests.data.documents.files import at, names
from tests.data.documents.files import problem as listing_problem
from tests.data.documents.texts import lines


def test_cards_are_documents_only_among_their_like(tmp_path: Path):
    for name in ("README.md", "LICENSE.md", "LICENSE"):
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["LICENSE.md", "README.md"]
    (tmp_path / "chapter.md").write_text("x")
    assert names(tmp_path) == ["LICENSE.md", "README.md", "chapter.md"]
    (tmp_path / "a.jsonl").write_text("x")
    assert names(tmp_path) == ["a.jsonl", "chapter.md"]
    assert names(tmp_path / "README.md") == ["README.md"]
    assert names(tmp_path, pattern="**/*.md") == ["LICENSE.md", "README.md", "chapter.md"]


@pytest.mark.parametrize(
    ("name", "is_card"),
    [("README.md", True), ("Readme_zh.md", True), ("readme.TXT", True), ("LICENCE-MIT.txt", True), ("x/COPYING", True),
     ("dataset_card.md", True), ("NOTICE.md", True), ("reader.txt", False), ("licensed.md", False),
     ("README.jsonl", False), ("noticeable.txt", False)],
)  # fmt: skip
def test_the_names_of_cards(name: str, is_card: bool):
    assert is_dataset_card(name) == is_card


def test_a_card_beside_data_that_cannot_be_read_is_not_the_data(tmp_path: Path):
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "train.csv").write_text("text\nx")
    assert "no file to read" in (line := listing_problem(at(tmp_path)))
    assert "saw .csv, want .txt" in line


def test_behind_a_url_the_same_files_are_data():
    system = fsspec.filesystem("memory")
    for name in ("README.md", "a.jsonl", "a.jsonl.gz", "b.csv", "x.ndjson"):
        system.pipe_file(f"/cloned/{name}", b"x")
    try:
        place = find_source_files(at("memory://cloned"))
    finally:
        system.rm("/cloned", recursive=True)
    assert [shard.name for shard in place.shards] == ["a.jsonl", "a.jsonl.gz", "x.ndjson"]
    assert place.unread == {".csv": 1, "cards and licences": 1}


def test_a_folder_of_save_to_disk_says_how_to_read_it(tmp_path: Path):
    for split_name in ("train", "test"):
        (tmp_path / split_name).mkdir()
        for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
            (tmp_path / split_name / name).write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    for place in (tmp_path, tmp_path / "train"):
        line = listing_problem(at(place))
        assert "data-00000-of-00001.arrow" in line
        assert f"datasets.load_from_disk('{place}')" in line


def test_a_state_of_something_else_is_data(tmp_path: Path):
    (tmp_path / "state.json").write_text(lines(1))
    assert names(tmp_path) == ["state.json"]
    with pytest.raises(UserError):
        find_source_files(at(tmp_path, pattern="*.txt"))
