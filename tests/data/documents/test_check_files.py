"""Each file is read once, none that is held out is trained on, and what is no data is not read: all of it is said."""

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from smoltrain.config.schema import Config
from smoltrain.data.documents.check_files import find_evaluation_splits
from smoltrain.data.documents.file_kinds import is_dataset_card
from smoltrain.data.documents.find_files import find_source_files
from smoltrain.data.documents.folders import BROKEN_LINKS, REPEATED_FOLDERS, SPECIAL_FILES, UNREADABLE_FOLDERS
from smoltrain.data.documents.shard import Shard, printable_name
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.errors import UserError
from tests.data.documents.test_listing import at, names
from tests.data.documents.test_listing import problem as listing_problem
from tests.data.tokens.test_tokenise import given, problem, split

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:%064x\nsize 12345\n"


def text(i: int) -> str:
    return f"This is document {i:02}. " * 10


def lines(*numbers: int) -> str:
    return "".join(json.dumps({"text": text(i)}) + "\n" for i in numbers)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve texts in `source`, and a tokenizer in `given`."""
    (tmp_path / "source").mkdir()
    for i in range(12):
        (tmp_path / "source" / f"{i:02}.txt").write_text(text(i))
    Tokenizer.train_bpe([text(12)], 270, "<|endoftext|>").save(tmp_path / "given")
    return tmp_path


def prepared_of(root: Path, mode: str = "cached", **changes: Any) -> PreparedData:
    return prepare_run_data(config(root, mode, **changes))


def config(root: Path, mode: str = "cached", **changes: Any) -> Config:
    made = given(root, data__mode=mode, **({"data__streams": 2} if mode == "stream" else {}), **changes)
    return made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"every": 1, "rows": 3})})


def sides(prepared: PreparedData, number: int = 0) -> tuple[list[str], list[str]]:
    return split(prepared, prepared.train[number]), split(prepared, prepared.validation[number])


def both(prepared: PreparedData, number: int = 0) -> list[str]:
    train, validation = sides(prepared, number)
    return train + validation


# ---- held out and trained on


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
    files = prepared.index["fingerprint"]["sources"]
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


def test_two_fields_of_one_file_are_two_texts(root: Path):
    table = pa.table({"text": [text(i) for i in range(9)], "more": [text(i) for i in range(20, 29)]})
    pq.write_table(table, root / "a.parquet")
    parts = [
        {"name": field, "path": str(root / "a.parquet"), "text_field": field, "weight": 1.0}
        for field in ("text", "more")
    ]
    prepared = prepared_of(root, data__path=None, data__sources=parts)
    assert set(both(prepared, 1)) == {text(i) for i in range(20, 29)}


# ---- one file under several names


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


def listed(folder: Path, **changes: Any) -> Any:
    from smoltrain.data.documents.listing import list_all_sources

    return list_all_sources(given(folder, data__path=str(folder), **changes))["data"]


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


def test_links_among_many_folders_are_no_maze(tmp_path: Path):
    for i in range(10):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.txt").write_text("a")
        for j in range(10):
            (tmp_path / f"{i}" / f"to{j}").symlink_to(f"../{j}")
    assert names(tmp_path) == [f"{i}/a.txt" for i in range(10)]


# ---- what is no data


def test_what_can_not_be_read_is_passed_over_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "b.txt").write_text("b")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jsonl"))
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "round.txt").symlink_to("round.txt")
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(tmp_path) == ["a.txt"]
    assert find_source_files(at(tmp_path)).unread == {UNREADABLE_FOLDERS: 1, BROKEN_LINKS: 2, SPECIAL_FILES: 2}
    assert "which is no regular file" in listing_problem(at(tmp_path / "pipe.txt"))
    (tmp_path / "a.txt").unlink()
    assert "but 2 broken links, 2 pipes, sockets and devices, want" in listing_problem(at(tmp_path, pattern="*"))


def test_what_is_not_read_stands_in_the_line_about_the_data(root: Path):
    for name in ("a.csv", "b.CSV", "c.arrow", "d.jsonl.xz", "Makefile", "README.md", "LICENSE", "dataset_infos.json"):
        (root / "source" / name).write_text("x")
    for mode in ("cached", "stream"):
        prepared = prepared_of(root, mode, run__name=mode)
        assert prepared.describe().endswith(
            "; not read: 1 .arrow, 2 .csv, 1 .xz, 2 cards and licences, 1 notes of datasets, 1 without a suffix"
        )
    assert sum(len(side) for side in sides(prepared_of(root))) == 12


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


def test_ndjson_is_jsonl_by_another_name(root: Path):
    for path in (root / "source").iterdir():
        path.unlink()
    (root / "source" / "a.ndjson").write_text(lines(0, 1, 2, 3))
    (root / "source" / "b.ndjson.gz").write_bytes(gzip.compress(lines(4, 5, 6).encode()))
    (root / "source" / "c.NDJSON.zst").write_bytes(zstandard.compress(lines(7, 8, 9).encode()))
    assert sorted(both(prepared_of(root))) == [text(i) for i in range(10)]


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


def test_behind_a_url_a_file_is_read_once():
    from smoltrain.data.documents.duplicate_files import remove_duplicate_files

    shards = [Shard(name, f"s3://bucket/{name}", 5, "size only") for name in ("a.txt", "a.txt.zst", "b.txt")]
    kept, left = remove_duplicate_files(shards)
    assert [shard.name for shard in kept] == ["a.txt", "b.txt"]
    assert left == ["a.txt.zst (is a.txt)"]


# ---- pointers


@pytest.mark.parametrize("mode", ["cached", "stream"])
@pytest.mark.parametrize("name", ["07.txt", "x.jsonl", "x.parquet", "x.jsonl.zst", "x.md", "x.ndjson.gz"])
def test_a_pointer_of_git_lfs_is_not_trained_on(root: Path, mode: str, name: str):
    (root / "source" / name).write_text(LFS % 3)
    line = problem(config(root, mode))
    assert line.startswith(f"1 file of 'data' is a pointer of Git LFS, not the data: saw {name}, want")
    assert "`git lfs pull`" in line
    assert not (root / "runs").exists()


def test_all_pointers_are_counted(root: Path):
    for i in range(12):
        (root / "source" / f"{i:02}.txt").write_bytes((LFS % i).replace("\n", "\r\n").encode())
    line = problem(config(root))
    assert line.startswith("12 files of 'data' are pointers of Git LFS, not the data: saw 00.txt, 01.txt, 02.txt and 9")


@pytest.mark.parametrize("unlocked", [False, True])
def test_a_pointer_of_git_annex(root: Path, unlocked: bool):
    key = "annex/objects/SHA256E-s5--2cf24dba.txt"
    if unlocked:
        (root / "source" / "x.txt").write_text(f"/{key}\n")
    else:
        (root / "source" / "x.txt").symlink_to(f"../.git/{key}")
    assert "`git annex get`" in problem(config(root))


def test_a_text_about_pointers_is_a_text(root: Path):
    (root / "source" / "x.txt").write_text("A pointer begins so:\n" + LFS % 1)
    assert sum(len(side) for side in sides(prepared_of(root))) == 13


# ---- splits and separators


@pytest.mark.parametrize(
    ("files", "evaluation"),
    [
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], ["test"]),
        (["data/train-0.parquet", "data/validation-0.parquet", "data/test-0.parquet"], ["test", "validation"]),
        (["train/a.jsonl", "dev/a.jsonl"], ["validation"]),
        (["wiki.train.tokens.txt", "wiki.valid.tokens.txt"], ["validation"]),
        (["openwebtext_train.jsonl.zst", "openwebtext_val.jsonl.zst"], ["validation"]),
        (["a.txt", "eval.jsonl.gz"], ["validation"]),
        (["test-0.parquet", "test-1.parquet"], []),  # asked for
        (["train-0.parquet", "train-1.parquet"], []),
        (["the-test-of-time.txt", "contest.txt", "devotion.txt"], []),
    ],
)
def test_splits_for_evaluation_are_noticed(files: list[str], evaluation: list[str]):
    assert list(find_evaluation_splits(files)) == evaluation


def test_a_split_for_evaluation_is_warned_of_unless_it_is_held_out(root: Path, capsys: Any):
    (root / "source" / "test.txt").write_text(text(50))
    prepared_of(root)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("data: warning: files of data seem to be for evaluation and are trained on like the others")
    assert "1 of test (test.txt)" in line
    prepared_of(root, run__name="b", data__validation_path=str(root / "source" / "test.txt"))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_stories_in_one_file_are_refused_before_anything_slow(root: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    raw = "".join(f"story {i} " * 9 + "\n<|endoftext|>\n" for i in range(300)).encode()
    packed = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.compress(raw)}[suffix]
    (root / "stories").mkdir()
    (root / "stories" / f"all.txt{suffix}").write_bytes(packed)
    monkeypatch.setattr("smoltrain.data.documents.retry.read_records_with_retry", None)  # nothing is read
    line = problem(config(root, "stream", data__path=str(root / "stories")))
    assert line.startswith(
        "the source 'data' has fewer documents than streams: saw 1, as each file is one, want at least"
    )
    assert "change data.documents=separator, or" in line


def test_texts_without_a_separator_may_be_cut_otherwise(root: Path):
    path = str(root / "source" / "00.txt")
    assert "change data.documents=blank_lines or separator, or" in problem(config(root, "stream", data__path=path))


def test_a_separator_in_whole_files_is_pointed_out(root: Path, capsys: Any):
    (root / "source" / "00.txt").write_text(f"{text(0)}<|endoftext|>{text(1)}")
    prepared_of(root)
    assert "data: '<|endoftext|>' stands in 00.txt: data.documents=separator would cut" in capsys.readouterr().out
    prepared_of(root, run__name="b", data__documents="separator")
    assert "stands in" not in capsys.readouterr().out


# ---- names


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_a_file_name_that_is_not_utf8_trains(root: Path, mode: str, capsys: Any):
    raw = os.fsencode(root / "source") + b"/r\xe9sum\xe9.txt"
    Path(os.fsdecode(raw)).write_text(text(40))
    Path(os.fsdecode(raw.replace(b"r\xe9s", b"b\xe9d"))).write_bytes(b"\xff")  # a bad one, whose place is printed
    prepared = prepared_of(root, mode)
    assert prepare_run_data(config(root, mode)).index == prepared.index
    if mode == "cached":
        assert text(40) in both(prepared)
        assert r"b\xe9dum\xe9.txt" in capsys.readouterr().out.encode().decode()
    else:
        assert r"r\xe9sum\xe9.txt" in [shard.name for shard in prepared.shards[0]]


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


def test_a_name_is_shown_on_one_line_and_without_commands_to_a_terminal():
    assert printable_name("a\nb\x1b[31m\u2028\udce9 \u3000é𝄞.txt") == "a\\nb\\x1b[31m\\u2028\\xe9 \u3000é𝄞.txt"
