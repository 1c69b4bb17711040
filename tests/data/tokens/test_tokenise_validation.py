"""The validation side of what is streamed, and of sources that have one of their own."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltrain.data.documents import retry
from smoltrain.data.documents.records import Document
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokens.packing import count_rows
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.token_files import content_hash
from smoltrain.data.tokens.tokenise_validation import OPEN_SHARDS, HeldOutReader
from smoltrain.errors import UserError
from tests.data.tokens.test_prepare import T, config, mixed, texts, twelve, write
from tests.data.tokens.test_tokenise import contents, make, problem, split


@pytest.fixture
def root(tmp_path: Path):
    return twelve(tmp_path)


def test_only_the_validation_side_is_made(root: Path):
    prepared = prepare_run_data(config(root))
    assert prepared.train == ()
    (validation_tokens,) = prepared.validation
    assert 3 * T + 1 <= len(validation_tokens) < 3 * T + 1 + 60  # no longer than by its last document
    found = split(prepared, validation_tokens)
    assert set(found) <= set(texts(root / "source", held=True))
    assert validation_tokens.hashes.tolist() == [content_hash(text) for text in found]
    (shards,) = prepared.shards
    assert [shard.name for shard in shards] == [f"{i:02}.jsonl" for i in range(12)]
    assert sorted(contents(root / "runs" / "run")) == [
        "data/data/validation-00000.bin",
        "data/data/validation.hashes",
        "data/data/validation.starts",
        "data/index.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    amount = f"validation {len(validation_tokens):,} of {len(found)}, held out by documents"
    assert prepared.describe() == f"stream, as data.mode=stream; 12 files through 4 streams; {amount}"


def test_validation_sees_shards_all_over_the_source(root: Path):
    made = config(root)
    many = made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"rows": 60})})
    prepared = prepare_run_data(many)
    shards = [text.partition("shard ")[2].partition(".")[0] for text in split(prepared, prepared.validation[0])]
    counts = {shard: shards.count(shard) for shard in shards}
    assert len(counts) >= 8
    assert max(map(int, counts)) > 9
    whole = many.model_copy(update={"evaluate": made.evaluate.model_copy(update={"rows": 10**6})})
    data_, run = whole.data, whole.run.model_copy(update={"name": "whole"})
    prepared = prepare_run_data(whole.model_copy(update={"data": data_, "run": run}))
    found = split(prepared, prepared.validation[0])
    assert sorted(found) == sorted(texts(root / "source", held=True))  # the source ends; each of them once


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5), max_size=20))
def test_documents_in_turn_are_all_documents(sizes: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def documents(shard: Shard, *_: Any, **__: Any) -> Any:
        opened.append(shard.name)
        yield from (Document(f"{shard.name}:{i}", i, "text") for i in range(int(shard.name.partition("x")[2])))
        closed.append(shard.name)

    opened: list[str] = []
    closed: list[str] = []
    monkeypatch.setattr(retry, "read_records_with_retry", documents)
    made = make(tmp_path)
    shards = tuple(Shard(f"{i}x{size}", "", 1, "") for i, size in enumerate(sizes))
    reading = HeldOutReader(made.data.parts[0], made.data, tmp_path, retry.ReaderHealth())
    seen = []
    for document in reading.documents(shards):
        seen.append(document.name)
        assert len(opened) - len(closed) <= OPEN_SHARDS
    assert sorted(seen) == sorted(
        f"{shard.name}:{i}" for shard, size in zip(shards, sizes, strict=True) for i in range(size)
    )


def test_a_source_that_holds_nothing_out(root: Path):
    line = problem(config(root, data__validation_share=1e-9))
    assert "no document of the source 'data' is held out: saw none of 300, want at least one" in line
    assert "change data.validation_share = 1e-09" in line
    assert contents(root / "runs") == {}


def test_fewer_documents_than_streams(root: Path):
    num = len(texts(root / "source", held=False))
    for extra, rows in ((0, num), (1, num + 1)):
        made = config(root, run__name=f"run{extra}", data__streams=num + extra)
        if extra:
            with pytest.raises(UserError, match=f"fewer documents than streams: saw {num} to train on, .* {num + 1}"):
                prepare_run_data(made, rows_per_step=rows)
        else:
            assert prepare_run_data(made, rows_per_step=rows).streams == num


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_held_out_files_are_the_whole_validation_side(root: Path, mode: str):
    write(root / "held", 2, "exam", num=4)
    prepared = prepare_run_data(config(root, mode, data__validation_path=str(root / "held")))
    about = prepared.index.sources["data"]
    assert about.held_out == "validation_path"
    assert prepared.describe().endswith("held out by validation_path")
    exams = texts(root / "held", held=True, share=1)
    found = split(prepared, prepared.validation[0])
    assert set(found) <= set(exams)
    if mode == "cached":
        assert found == exams
        everything = texts(root / "source", held=False, share=0)
        assert split(prepared, prepared.train[0]) == everything
    assert "validation_share" not in prepared.index.fingerprint.sources["data"]
    other = config(root, mode, data__validation_path=str(root / "held"), data__validation_share=0.1)
    assert prepare_run_data(other).index == prepared.index
    (root / "held" / "01.jsonl").unlink()
    assert "validation_files/01.jsonl = none" in problem(config(root, mode, data__validation_path=str(root / "held")))


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_held_out_files_without_a_document(root: Path, mode: str):
    (root / "empty.txt").write_text("")
    line = problem(config(root, mode, data__validation_path=str(root / "empty.txt")))
    assert "the source 'data' has no document to validate on" in line
    assert not (root / "runs" / "run" / "data" / "index.json").exists()


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_several_sources_each_have_their_own(root: Path, mode: str):
    made = mixed(root, mode)
    many = made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"rows": 8})})
    prepared = prepare_run_data(many)
    num_rows = [count_rows(len(held), T) for held in prepared.validation]
    assert [
        all(name in text for text in split(prepared, held))
        for name, held in zip(("poems", "code"), prepared.validation, strict=True)
    ] == [True, True]
    if mode == "stream":
        assert num_rows[0] >= 6 > num_rows[1] + 1 >= 2 + 1
        assert [len(shards) for shards in prepared.shards] == [3, 2]
    else:
        for name, train in zip(("poems", "code"), prepared.train, strict=True):
            assert split(prepared, train) == texts(root / name, held=False)
    turned = prepare_run_data(mixed(root, mode, "code", "poems"))
    assert [len(held) for held in turned.validation] == [len(held) for held in prepared.validation][::-1]
    write(root / "news", 1, "news")
    assert "prepared from other sources: saw poems, news, want poems, code" in problem(
        mixed(root, mode, "poems", "news")
    )
    words = prepared.describe()
    assert ("poems 3 files, code 2 files through 4 streams" in words) == (mode == "stream")
