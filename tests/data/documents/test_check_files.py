"""What the first look at the files of a new run finds: pointers, evaluation splits, separators."""

import gzip
from pathlib import Path
from typing import Any

import pytest
import zstandard

from smoltrain.data.documents.check_files import find_evaluation_splits
from tests.data.documents.texts import config, prepared_of, sides, text
from tests.data.tokens.test_tokenise import problem

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:%064x\nsize 12345\n"


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


def test_the_folder_to_change_is_that_of_the_first_pointer(root: Path):
    for name in ("a/x.txt", "b/y.txt", "c/z.txt"):
        (root / "source" / name).parent.mkdir()
        (root / "source" / name).write_text(text(1) if name == "a/x.txt" else LFS % 3)
    assert problem(config(root)).endswith(f"change {root / 'source' / 'b'}")


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


@pytest.mark.parametrize(
    ("files", "evaluation"),
    [
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], ["test"]),
        (["data/train-0.parquet", "data/validation-0.parquet", "data/test-0.parquet"], ["test", "validation"]),
        (["train/a.jsonl", "dev/a.jsonl"], ["validation"]),
        (["wiki.train.tokens.txt", "wiki.valid.tokens.txt"], ["validation"]),
        (["openwebtext_train.jsonl.zst", "openwebtext_val.jsonl.zst"], ["validation"]),
        (["a.txt", "eval.jsonl.gz"], ["validation"]),
        (["my.v1.train.txt", "my.v1.test.txt"], ["test"]),
        (["reviews.train.jsonl", "reviews.test.jsonl.gz", "reviews.dev.00000-of-00001.jsonl"], ["test", "validation"]),
        (["a.txt", "a.test.of.time.txt"], []),
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
