"""Records that are no documents are counted, logged with their address and skipped, up to a limit."""

import json
from pathlib import Path

import pytest

from smoltrain import data
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.errors import UserError
from tests.data.test_cached import contents, given, make, problem, twenty
from tests.data.test_prepare import config, twelve


@pytest.fixture
def root(tmp_path: Path):
    return twenty(tmp_path)


def test_an_error_on_the_way_leaves_no_partial_files(root: Path):
    Tokenizer.train_bpe(["abc"], 257, "<|endoftext|>").save(root / "given")
    (root / "source" / "99.txt").write_bytes(b"\xff")
    config = given(root, data__max_bad_records=0)
    line = problem(config)
    assert line.startswith("more than 0 records of 'data' are bad; the last one: ")
    assert str(root / "source" / "99.txt") in line
    assert "change data.max_bad_records" in line
    assert list(contents(config.run_folder)) == ["data/bad-records.jsonl"]


def test_bad_records_are_counted_logged_and_skipped(root: Path, capsys: pytest.CaptureFixture[str]):
    good = data.prepare(make(root, run__name="good"))
    assert not (root / "runs" / "good" / "data" / "bad-records.jsonl").exists()
    for i in range(4):
        (root / "source" / f"bad{i}.txt").write_bytes(b"\xff")
    config = make(root, data__max_bad_records=4)
    prepared = data.prepare(config)
    assert prepared.train[0].all().tolist() == good.train[0].all().tolist()
    assert prepared.index["sources"]["data"]["bad_records"] == 4
    assert prepared.describe().endswith("; 4 bad records skipped")
    log = [json.loads(line) for line in (config.run_folder / "data" / "bad-records.jsonl").read_text().splitlines()]
    assert [Path(bad["place"].rpartition(":")[0] or bad["place"]).name for bad in log] == [
        f"bad{i}.txt" for i in range(4)
    ]
    assert {bad["source"] for bad in log} == {"data"}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"data: 4 bad records of data skipped: {log[0]['place']}: {log[0]['why']}; ")
    assert line.count("bad2.txt") == 1
    assert "bad3.txt" not in line
    assert line.endswith(f"; the others are in {config.run_folder / 'data' / 'bad-records.jsonl'}")


@pytest.mark.parametrize("kind", ["nothing but bad ones", "blank"])
def test_a_source_without_documents(root: Path, kind: str):
    for path in (root / "source").iterdir():
        path.unlink()
    (root / "source" / "a.jsonl").write_text("{}\n" if kind == "nothing but bad ones" else "\n\n")
    Tokenizer.train_bpe(["abc"], 257, "<|endoftext|>").save(root / "given")
    with pytest.raises(UserError) as caught:
        data.prepare(given(root))
    (only,) = caught.value.problems
    assert "has no document" in str(only) or "text field" in str(only)


def test_bad_records_of_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = twelve(tmp_path)
    with (root / "source" / "00.jsonl").open("r+") as file:
        file.write("{]")
    prepared = data.prepare(config(root))
    assert prepared.index["sources"]["data"]["bad_records"] == 1
    assert "data: 1 bad record of data skipped: " in capsys.readouterr().out
    assert "more than 0 records of 'data' are bad" in problem(config(root, run__name="b", data__max_bad_records=0))
