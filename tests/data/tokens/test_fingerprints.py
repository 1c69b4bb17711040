"""Prepared from other data, or by other settings, than a run has now: refused, or accepted and written down."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from smoltrain.data.documents import listing
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokenizers import by_name
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.fingerprints import describe_fingerprint_changes
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import Problem, UserError
from tests.data.tokens.test_prepare import config, on_hub, touch
from tests.data.tokens.test_tokenise import given, make, problem, snapshot


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (
            {"data__validation_share": 0.25},
            "saw sources/data/validation_share = 0.25, want sources/data/validation_share = 0.3",
        ),
        ({"tokenizer__vocab_size": 270}, "saw tokenizer/bpe = 270, want tokenizer/bpe = 280"),
        ({"data__pattern": "0*.txt"}, "saw sources/data/files/10.txt = none"),
    ],
)
def test_another_config_is_refused_and_nothing_overwritten(root: Path, change: dict[str, Any], shown: str):
    config = make(root)
    prepare_run_data(config)
    before = snapshot(config.run_folder)
    line = problem(make(root, **change))
    assert shown in line
    assert "run.name" in line
    assert snapshot(config.run_folder) == before


def test_changed_documents_are_refused_and_nothing_overwritten(root: Path):
    config = make(root)
    prepare_run_data(config)
    before = snapshot(config.run_folder)
    file = root / "source" / "03.txt"
    file.write_text(file.read_text().swapcase())  # of the same size
    assert "saw sources/data/files/03.txt = 210 bytes (" in problem(config)
    assert snapshot(config.run_folder) == before


def test_a_given_tokenizer_is_copied_and_its_content_counts_not_its_place(root: Path):
    trained = Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>")
    for folder in ("given", "moved"):
        trained.save(root / folder)
    given = make(root, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None)
    prepare_run_data(given)
    assert (given.run_folder / "tokenizer" / "tokenizer.json").exists()
    prepare_run_data(make(root, tokenizer__name=str(root / "moved"), tokenizer__vocab_size=None))
    Tokenizer.train_bpe(["other"], 260, "<|endoftext|>").save(root / "moved")
    assert "tokenizer/sha256" in problem(make(root, tokenizer__name=str(root / "moved"), tokenizer__vocab_size=None))


def test_the_runs_own_tokenizer_serves_where_the_folder_is_gone_but_not_where_it_changed(root: Path):
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    config = given(root)
    first = prepare_run_data(config)
    before = snapshot(config.run_folder)
    (root / "given").rename(root / "gone")
    again = prepare_run_data(config)
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert snapshot(config.run_folder) == before
    Tokenizer.train_bpe(["other"], 262, "<|endoftext|>").save(root / "given")
    assert "tokenizer/sha256" in problem(config)
    shutil.rmtree(root / "given")
    line = problem(make(root, tokenizer__name="smollm2", tokenizer__vocab_size=None))
    assert f"saw tokenizer/name = smollm2, want tokenizer/name = {root / 'given'}" in line


def test_a_resume_asks_nobody_for_a_tokenizer_that_has_a_name(root: Path, monkeypatch: pytest.MonkeyPatch):
    named = lambda section: Tokenizer.train_bpe(["This is document"], 262, section.separator, section.pad)  # noqa: E731
    monkeypatch.setattr(by_name, "load_named_tokenizer", named)
    for i, name in enumerate(("smollm2", "gpt2", "tiktoken:gpt2", "OWNER/NAME")):
        monkeypatch.setattr(by_name, "load_named_tokenizer", named)
        config = make(root, run__name=f"run{i}", tokenizer__name=name, tokenizer__vocab_size=None)
        prepare_run_data(config)
        monkeypatch.setattr(by_name, "load_named_tokenizer", None)
        prepare_run_data(config)
        other = make(root, run__name=f"run{i}", tokenizer__name="other/one", tokenizer__vocab_size=None)
        assert f"saw tokenizer/name = other/one, want tokenizer/name = {name}" in problem(other)
        bpe = make(root, run__name=f"run{i}")
        assert "saw tokenizer/bpe = 280" in problem(bpe)


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_changed_data_are_refused_or_accepted_and_written_down(
    shard_root: Path, mode: str, capsys: pytest.CaptureFixture[str]
):
    first = prepare_run_data(config(shard_root, mode))
    before = snapshot(shard_root / "runs")
    touch(shard_root)
    line = problem(config(shard_root, mode))
    assert "saw sources/data/files/03.jsonl = " in line
    assert "data.allow_changed=true goes on" in line
    assert snapshot(shard_root / "runs") == before
    capsys.readouterr()
    accepted = prepare_run_data(config(shard_root, mode, data__allow_changed=True))
    (said,) = capsys.readouterr().out.splitlines()
    assert "sources/data/files/03.jsonl" in said
    assert [change["saw"].partition(" = ")[0] for change in accepted.index.changes] == ["sources/data/files/03.jsonl"]
    assert accepted.validation[0].all().tolist() == first.validation[0].all().tolist()
    if mode == "cached":
        assert accepted.train[0].all().tolist() == first.train[0].all().tolist()
    else:
        assert [shard.version for shard in accepted.shards[0] if shard.name == "03.jsonl"] == ["mtime 1"]
    again = prepare_run_data(config(shard_root, mode))  # it is these data now
    assert again.index == accepted.index
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_what_is_not_a_change_of_data_is_never_accepted(shard_root: Path, mode: str):
    prepare_run_data(config(shard_root, mode))
    changes = {"data__allow_changed": True}
    line = problem(config(shard_root, mode, data__validation_share=0.2, **changes))
    assert "saw sources/data/validation_share = 0.2, want sources/data/validation_share = 0.3" in line
    assert "allow_changed" not in line
    Tokenizer.train_bpe(["other"], 270, "<|endoftext|>").save(shard_root / "given")
    assert "tokenizer/sha256" in problem(config(shard_root, mode, **changes))


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_a_moved_folder_is_the_same_data(shard_root: Path, mode: str):
    first = prepare_run_data(config(shard_root, mode))
    (shard_root / "source").rename(shard_root / "moved")
    second = prepare_run_data(config(shard_root, mode, data__path=str(shard_root / "moved")))
    assert second.index.fingerprint == first.index.fingerprint
    assert second.index.changes == []
    if mode == "stream":
        assert all(Path(shard.url).is_file() for shard in second.shards[0])


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_a_resume_asks_no_hub(shard_root: Path, mode: str, monkeypatch: pytest.MonkeyPatch):
    asked = on_hub(shard_root, monkeypatch)
    changes: dict[str, Any] = {"data__path": None, "data__hub": "me/texts"}
    first = prepare_run_data(config(shard_root, mode, **changes))
    assert asked == [None]
    about = first.index.fingerprint.sources["data"]
    assert about["commit"] == "c0ffee"
    again = prepare_run_data(config(shard_root, mode, **changes))
    assert asked == [None]
    assert again.index == first.index
    assert again.shards == first.shards
    for key, value in {"hub": "me/others", "hub_config": "en", "hub_split": "test", "text_field": "body"}.items():
        line = problem(config(shard_root, mode, **(changes | {f"data__{key}": value})))
        assert f"saw sources/data/{key.removeprefix('hub_')} = {value}, want sources/data/" in line


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_a_resume_with_files_that_are_held_out_stays_at_the_commit_of_its_dataset(
    shard_root: Path, mode: str, monkeypatch: pytest.MonkeyPatch
):
    asked = on_hub(shard_root, monkeypatch)
    held_out = shard_root / "held.jsonl"
    held_out.write_bytes(sorted((shard_root / "source").iterdir())[0].read_bytes())
    changes: dict[str, Any] = {"data__path": None, "data__hub": "me/texts", "data__validation_path": str(held_out)}
    first = prepare_run_data(config(shard_root, mode, **changes))
    assert prepare_run_data(config(shard_root, mode, **changes)).index == first.index
    assert asked == [None, "c0ffee"], "the newest commit may be another one by now"


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_damaged_tokens_of_a_dataset_are_made_anew_of_its_commit(
    shard_root: Path, mode: str, monkeypatch: pytest.MonkeyPatch
):
    asked = on_hub(shard_root, monkeypatch)
    changes: dict[str, Any] = {"data__path": None, "data__hub": "me/texts"}
    first = prepare_run_data(config(shard_root, mode, **changes))
    damaged = next((shard_root / "runs").rglob("validation*.bin"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert prepare_run_data(config(shard_root, mode, **changes)).index == first.index
    assert asked == [None, "c0ffee"]


def test_a_cached_run_does_without_its_server(shard_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    on_hub(shard_root, monkeypatch)
    changes: dict[str, Any] = {"data__path": "https://server/texts.jsonl"}
    first = prepare_run_data(config(shard_root, "cached", **changes))
    prepare_run_data(config(shard_root, "stream", run__name="b", **changes))

    def shards(*_: Any, **__: Any) -> list[Shard]:
        raise UserError(Problem("no server", "nothing", "an answer", "it"))

    monkeypatch.setattr(listing, "find_source_files", shards)
    assert prepare_run_data(config(shard_root, "cached", **changes)).index == first.index
    assert "no server" in capsys.readouterr().out
    assert "no server" in problem(config(shard_root, "stream", run__name="b", **changes))


def test_a_cached_run_with_files_that_are_held_out_does_without_the_hub(
    shard_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    on_hub(shard_root, monkeypatch)
    held_out = shard_root / "held.jsonl"
    held_out.write_bytes(sorted((shard_root / "source").iterdir())[0].read_bytes())
    changes: dict[str, Any] = {"data__path": None, "data__hub": "me/texts", "data__validation_path": str(held_out)}
    first = prepare_run_data(config(shard_root, "cached", **changes))

    def shards(*_: Any, **__: Any) -> list[Shard]:
        raise UserError(Problem("no Hub", "nothing", "an answer", "it"))

    monkeypatch.setattr(listing, "find_source_files", shards)
    assert prepare_run_data(config(shard_root, "cached", **changes)).index == first.index
    assert "the tokens that were made of it stay in use" in capsys.readouterr().out


def test_a_fingerprint_of_the_wrong_kind_can_be_shown():
    for value in (None, "x", {"bytes": "x", "sha256": 5}, {"bytes": None}, {"bytes": 5, "version": []}, [[]]):
        describe_fingerprint_changes({"sources/data/files/a": (value, {"bytes": 5, "sha256": "0" * 64})})
