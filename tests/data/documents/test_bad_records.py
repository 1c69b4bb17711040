"""Records that are no documents are counted, logged with their address and skipped, up to a limit."""

import json
from pathlib import Path

import pytest

from smoltrain.data.documents import bad_records
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from tests.data.tokens.test_prepare import config, twelve
from tests.data.tokens.test_tokenise import contents, given, make, problem, twenty


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
    good = prepare_run_data(make(root, run__name="good"))
    assert not (root / "runs" / "good" / "data" / "bad-records.jsonl").exists()
    for i in range(4):
        (root / "source" / f"bad{i}.txt").write_bytes(b"\xff")
    config = make(root, data__max_bad_records=4)
    prepared = prepare_run_data(config)
    assert prepared.train[0].all().tolist() == good.train[0].all().tolist()
    assert prepared.index.sources["data"].bad_records == 4
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
        prepare_run_data(given(root))
    (only,) = caught.value.problems
    assert "has no document" in str(only) or "text field" in str(only)


def test_bad_records_of_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = twelve(tmp_path)
    with (root / "source" / "00.jsonl").open("r+") as file:
        file.write("{]")
    prepared = prepare_run_data(config(root))
    assert prepared.index.sources["data"].bad_records == 1
    assert "data: 1 bad record of data skipped: " in capsys.readouterr().out
    assert "more than 0 records of 'data' are bad" in problem(config(root, run__name="b", data__max_bad_records=0))


# ---- a share of them


def jsonl(root: Path, *records: tuple[int, str]) -> None:
    """ROOT/source as one file of so many records of each kind, one kind after another."""
    for path in (root / "source").iterdir():
        path.unlink()
    kinds = {
        "good": '{"text": "%d: the king of Naples"}\n',
        "bad": "{%d]\n",
        "empty": '{"text": ""}\n',
        "null": '{"text": null}\n',
    }
    lines = [kinds[kind].replace("%d", str(i)) for count, kind in records for i in range(count)]
    (root / "source" / "a.jsonl").write_text("".join(lines))
    Tokenizer.train_bpe(["abc"], 257, "<|endoftext|>").save(root / "given")


@pytest.mark.parametrize("first", ["bad", "good"])
def test_one_in_a_hundred_may_be_bad_wherever_they_stand(root: Path, first: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bad_records, "MIN_ALLOWED_BAD", 10)
    records = [(15, "bad"), (1485, "good")]
    jsonl(root, *(records if first == "bad" else reversed(records)))
    assert prepare_run_data(given(root)).index.sources["data"].bad_records == 15
    strict = given(root, run__name="b", data__max_bad_share=0.0099)
    assert problem(strict).startswith("15 of 1,500 records of 'data' are bad; the last one: the line is not JSON")
    assert problem(given(root, run__name="c", data__max_bad_records=14)).startswith("more than 14 records of 'data'")
    assert prepare_run_data(given(root, run__name="d", data__max_bad_records=15)).train


@pytest.mark.parametrize(("count", "is_refused"), [(100, False), (101, True)])
def test_a_hundred_may_be_bad_of_however_few(root: Path, count: int, is_refused: bool):
    jsonl(root, (200, "good"), (count, "bad"))
    if is_refused:
        assert f"{count} of {200 + count} records of 'data' are bad" in problem(given(root))
    else:
        prepare_run_data(given(root))


def test_what_is_refused_goes_on_with_a_higher_limit(root: Path, monkeypatch: pytest.MonkeyPatch):
    jsonl(root, (300, "good"), (120, "bad"))
    assert "data.max_bad_records or data.max_bad_share" in problem(given(root))
    monkeypatch.setattr("smoltrain.data.documents.retry.read_records_with_retry", None)  # all parts are whole
    assert prepare_run_data(given(root, data__max_bad_share=0.5)).index.sources["data"].bad_records == 120


def test_nothing_but_bad_ones_are_not_read_to_the_end(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bad_records, "EARLY_STOP_BAD", 500)
    jsonl(root, (10, "good"), (2000, "bad"))
    config = given(root)
    assert problem(config).startswith("more than 500 records of 'data' are bad")
    assert len((config.run_folder / "data" / "bad-records.jsonl").read_text().splitlines()) == 501


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_empty_records_are_counted_apart(root: Path, mode: str, capsys: pytest.CaptureFixture[str]):
    jsonl(root, (150, "empty"), (900, "good"), (150, "null"), (2, "bad"))
    changes = {"data__streams": 2, "data__max_bad_records": 2} if mode == "stream" else {"data__max_bad_records": 2}
    made = given(root, data__mode=mode, **changes)
    whole = made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"every": 1, "rows": 10**5})})
    prepared = prepare_run_data(whole)
    about = prepared.index.sources["data"]
    assert (about.bad_records, about.empty_records) == (2, 300)
    assert prepared.describe().endswith("; 300 empty records passed over; 2 bad records skipped")
    log = (made.run_folder / "data" / "bad-records.jsonl").read_text().splitlines()
    assert len(log) == 2
    if mode == "cached":
        assert "data: 300 empty records of data are passed over" in capsys.readouterr().out
        assert (again := prepare_run_data(whole)).index == prepared.index
        assert again.train[0].all().tolist() == prepared.train[0].all().tolist()


def test_a_restart_counts_empty_records_as_before(root: Path, monkeypatch: pytest.MonkeyPatch):
    jsonl(root, (7, "empty"), (300, "good"))
    monkeypatch.setattr("smoltrain.data.tokens.tokenise._join_source", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_run_data(given(root))
    monkeypatch.undo()
    assert prepare_run_data(given(root)).index.sources["data"].empty_records == 7


def test_a_single_text_is_one_document(root: Path):
    for path in (root / "source").iterdir():
        path.unlink()
    (root / "source" / "a.txt").write_text("the king of Naples " * 200)
    Tokenizer.train_bpe(["abc"], 257, "<|endoftext|>").save(root / "given")
    assert " tokens of 1 document; validation " in prepare_run_data(given(root)).describe()
