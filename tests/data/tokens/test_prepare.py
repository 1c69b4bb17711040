"""Which mode and why, what is made once in either, what is kept from the first start, and what runs share."""

import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from smoltrain.cli import app
from smoltrain.config.schema import Config
from smoltrain.data.documents import listing, retry
from smoltrain.data.documents.find_files import FoundFiles
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.documents.listing import SourceListing
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokenizers import train_bpe as train_bpe_module
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import plan_preparation
from smoltrain.data.tokens import tokenise as tokenise_module
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from smoltrain.run import run_lock
from tests import tiny
from tests.data.tokens.test_tokenise import contents, make, problem, snapshot

T = 16


def twelve(folder: Path) -> Path:
    """Twelve jsonl shards of 25 documents that say who they are, and a tokenizer in `given`."""
    write(folder / "source", 12, "document")
    Tokenizer.train_bpe(["This is document number 12 of shard 3."], 270, "<|endoftext|>").save(folder / "given")
    return folder


@pytest.fixture
def root(tmp_path: Path):
    return twelve(tmp_path)


def write(folder: Path, num_shards: int, word: str, num: int = 25) -> None:
    folder.mkdir()
    for shard in range(num_shards):
        texts = [f"This is {word} {i} of shard {shard}. " * 3 for i in range(num)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{shard:02}.jsonl").write_text(lines)


def texts(folder: Path, *, held: bool, share: float = 0.3) -> list[str]:
    """The documents of one side, in order."""
    return [
        json.loads(line)["text"]
        for path in sorted(folder.iterdir())
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if is_held_out(f"{path.name}:{number}", share) == held
    ]


def config(root: Path, mode: str = "stream", **changes: Any) -> Config:
    """Sources in ROOT/source, 4 rows per step on one rank, 3 rows to validate on."""
    base = {"tokenizer__name": str(root / "given"), "tokenizer__vocab_size": None, "data__mode": mode}
    made = make(root, **(base | changes))
    return made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"every": 1, "rows": 3})})


def mixed(root: Path, mode: str, *names: str, **changes: Any) -> Config:
    """Two sources, poems three times as heavy as code."""
    for name, num_shards in (("poems", 3), ("code", 2)):
        if not (root / name).exists():
            write(root / name, num_shards, name)
    weights = {"poems": 3.0, "code": 1.0, "news": 1.0}
    parts = [{"name": name, "path": str(root / name), "weight": weights[name]} for name in names or ("poems", "code")]
    return config(root, mode, data__path=None, data__sources=parts, **changes)


# ---- the mode


def test_small_local_files_are_cached_and_the_reason_is_said(root: Path, monkeypatch: pytest.MonkeyPatch):
    prepared = prepare_run_data(config(root, "auto"))
    assert (prepared.mode, prepared.mode_reason) == ("cached", "1 MiB of local files, at most 256 are cached")
    assert prepared.describe().startswith("cached, as 1 MiB of local files, at most 256 are cached; ")
    monkeypatch.setattr(plan_preparation, "MAX_AUTO_CACHED_MIB", 0)
    prepared = prepare_run_data(config(root, "auto", run__name="other"))
    assert (prepared.mode, prepared.mode_reason) == ("stream", "1 MiB of local files, only up to 0 are cached")


def test_what_is_not_on_this_machine_is_streamed(root: Path):
    local, remote = (Shard("a.txt", url, 5, "etag 1") for url in ("/a.txt", "https://server/a.txt"))
    auto = config(root, "auto")
    assert plan_preparation.choose_data_mode(auto.data, {"data": SourceListing((local, remote))}) == (
        "stream",
        "data is not on this machine",
    )
    assert plan_preparation.choose_data_mode(auto.data, {"data": SourceListing((local,), (remote,))})[0] == "stream"
    assert plan_preparation.choose_data_mode(auto.data, {"data": SourceListing((local,))})[0] == "cached"
    shared = config(root, "auto", data__cache=root / "cache")
    assert plan_preparation.choose_data_mode(shared.data, {"data": SourceListing((remote,))}) == (
        "cached",
        "data.cache names a folder",
    )


@pytest.mark.parametrize(("mode", "other"), [("stream", "cached"), ("cached", "stream")])
def test_the_mode_of_the_first_start_is_kept(root: Path, mode: str, other: str):
    prepare_run_data(config(root, mode))
    before = snapshot(root / "runs")
    assert prepare_run_data(config(root, "auto")).mode == mode
    assert f"prepared in the other mode: saw {other}, want {mode} or auto; change data.mode" in problem(
        config(root, other)
    )
    assert snapshot(root / "runs") == before


def test_prepared_ahead_all_of_it_is_cached(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan_preparation, "MAX_AUTO_CACHED_MIB", 0)
    prepared = prepare_run_data(config(root, "auto"), ahead=True)
    assert (prepared.mode, prepared.mode_reason) == ("cached", "it was prepared ahead")
    assert prepare_run_data(config(root, "auto")).mode == "cached"
    assert prepare_run_data(config(root, run__name="other"), ahead=True).mode == "stream"


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = tiny.words(tmp_path, f"data.cache={tmp_path / 'cache'}")
    result = CliRunner().invoke(app, ["prepare", "data", "quickstart", *words])
    assert result.exit_code == 0, result.output
    about, line, folder = result.stdout.splitlines()
    assert about.startswith("bpe: 320 ids, separator <|endoftext|> = 0; nothing of a sample of the text is lost")
    assert line.startswith("cached, as data.cache names a folder; ")
    assert (Path(folder) / "data" / "train-00000.bin").is_file()
    assert Path(folder).parent.parent == tmp_path / "cache"
    monkeypatch.setattr(retry, "read_records_with_retry", None)
    assert CliRunner().invoke(app, ["prepare", "data", "quickstart", *words]).stdout == result.stdout
    with run_lock.hold_run_lock(tiny.load(tmp_path)):
        monkeypatch.setattr(run_lock, "lock_run_folder", partial(run_lock.lock_run_folder, patience_s=0.0))
        refused = CliRunner().invoke(app, ["prepare", "data", "quickstart", *words])
    assert isinstance(refused.exception, UserError), "a run that is prepared or trained is not prepared by another one"
    assert "another process trains this run, or prepares its data" in str(refused.exception)


# ---- streams


def test_the_number_of_streams_is_chosen_once(root: Path):
    first = prepare_run_data(config(root), rows_per_step=12, world_size=2)
    chosen = first.streams
    assert chosen == 12
    assert prepare_run_data(config(root), rows_per_step=12, world_size=6).streams == 12
    assert "another number of streams: saw 6, want 12, as chosen at its first start" in problem(
        config(root, data__streams=6)
    )
    with pytest.raises(UserError, match="want one of 1, 2, 3, 4, 6, 12 ranks"):
        prepare_run_data(config(root), rows_per_step=12, world_size=8)
    with pytest.raises(
        UserError, match="the streams do not divide the rows of a step: saw 12 streams, want a divisor of 16"
    ):
        prepare_run_data(config(root), rows_per_step=16, world_size=2)


def test_cached_tokens_know_no_streams(root: Path):
    prepared = prepare_run_data(config(root, "cached"), rows_per_step=12, world_size=5)
    assert prepared.streams == 1
    assert prepare_run_data(config(root, "auto"), rows_per_step=12, world_size=7).streams == 1


# ---- several sources


def test_a_bpe_is_trained_on_documents_of_each_shard_of_each_source(root: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    train_bpe = Tokenizer.train_bpe

    def recording(some: Any, *rest: Any) -> Tokenizer:
        seen[:] = some
        return train_bpe(seen, *rest)

    monkeypatch.setattr(Tokenizer, "train_bpe", recording)
    bpe = {"tokenizer__name": "bpe", "tokenizer__vocab_size": 280}
    prepare_run_data(mixed(root, "cached", **bpe))
    assert len(seen) == 5 * 25  # all of them, the held-out ones too
    monkeypatch.setattr(plan_preparation, "MAX_AUTO_CACHED_MIB", 0)
    monkeypatch.setattr(train_bpe_module, "CHARACTERS_TO_TRAIN_ON", 4000)
    prepare_run_data(mixed(root, "stream", run__name="b", **bpe))
    for name, share, num_shards in (("poems", 3000, 3), ("code", 1000, 2)):
        some = [text for text in seen if name in text]
        assert sum(map(len, some)) == pytest.approx(share, rel=0.05)
        for shard in range(num_shards):
            first = f"This is {name} 0 of shard {shard}."
            assert sum(text.startswith(first) for text in some) == 1


# ---- other data


def touch(root: Path) -> None:
    file = root / "source" / "03.jsonl"
    file.write_text(file.read_text().replace("document", "DOCUMENT"))
    os.utime(file, ns=(1, 1))


def on_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """ROOT/source as a dataset of commit c0ffee; the list holds the commits that were asked for."""
    asked: list[str | None] = []

    def shards(source: Any, *, key: str, commit: str | None = None, held_out: bool = False) -> list[Shard]:
        if held_out and source.validation_path:
            path = Path(source.validation_path)
            return [Shard(path.name, str(path), path.stat().st_size, "mtime 1")]
        if held_out:
            return []
        asked.append(commit)
        paths = sorted((root / "source").iterdir())
        return [Shard(path.name, str(path), path.stat().st_size, "commit c0ffee") for path in paths]

    monkeypatch.setattr(listing, "find_source_files", lambda *args, **more: FoundFiles(shards(*args, **more), {}))
    return asked


# ---- tokens that runs share


def test_runs_share_a_cache(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    cache = {"data__cache": root / "cache"}
    alone = prepare_run_data(config(root, "cached", run__name="alone"))
    first = prepare_run_data(config(root, "auto", **cache))
    (home,) = (root / "cache").iterdir()
    assert first.index.cache == home.name
    assert len(home.name) == 16
    assert not list((root / "runs" / "run").rglob("*.bin"))
    monkeypatch.setattr(retry, "read_records_with_retry", None)
    before = contents(root / "cache")
    second = prepare_run_data(config(root, "auto", run__name="second", **cache))
    for prepared in (first, second, prepare_run_data(config(root, "auto", **cache))):
        assert prepared.train[0].all().tolist() == alone.train[0].all().tolist()
        assert prepared.validation[0].all().tolist() == alone.validation[0].all().tolist()
    assert contents(root / "cache") == before
    (root / "cache").rename(root / "elsewhere")
    moved = prepare_run_data(config(root, "auto", data__cache=root / "elsewhere"))
    assert len(moved.train[0]) == len(alone.train[0])
    assert f"want the folder that holds {home.name}; change data.cache" in problem(config(root, "auto"))
    with next((root / "elsewhere").rglob("train-*.bin")).open("ab") as file:
        file.write(b"xx")
    monkeypatch.undo()
    prepare_run_data(config(root, "auto", data__cache=root / "elsewhere"))
    assert "train-00000.bin is damaged" in capsys.readouterr().out
    assert contents(root / "elsewhere") == before


def test_a_cache_of_other_data_or_settings_is_another_one(root: Path):
    cache = {"data__cache": root / "cache"}
    prepare_run_data(config(root, "auto", **cache))
    for i, change in enumerate(({"data__validation_share": 0.2}, {"data__max_document_mib": 1}, {})):
        if not change:
            touch(root)
        prepare_run_data(config(root, "auto", run__name=f"run{i}", **cache, **change))
        assert len(list((root / "cache").iterdir())) == 2 + i


def test_a_bpe_is_shared_too(root: Path, monkeypatch: pytest.MonkeyPatch):
    bpe = {"data__cache": root / "cache", "tokenizer__name": "bpe", "tokenizer__vocab_size": 280}
    first = prepare_run_data(config(root, "auto", **bpe))
    monkeypatch.setattr(Tokenizer, "train_bpe", None)
    second = prepare_run_data(config(root, "auto", run__name="second", **bpe))
    assert second.tokenizer.fingerprint() == first.tokenizer.fingerprint()


def test_two_runs_that_prepare_at_once(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """The second waits for the first, and then reads nothing."""
    tokenise, inside, go_on, count = tokenise_module.tokenise_sources, threading.Event(), threading.Event(), []

    def slow(*arguments: Any) -> dict[str, Any]:
        count.append(1)
        inside.set()
        assert go_on.wait(30)
        return tokenise(*arguments)

    monkeypatch.setattr(tokenise_module, "tokenise_sources", slow)
    found = {}

    def run(name: str) -> None:
        found[name] = prepare_run_data(config(root, "auto", run__name=name, data__cache=root / "cache"))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    out = ""
    while "data: waits for the run that tokenises into" not in out:
        threads[1].join(0.05)
        assert threads[1].is_alive()
        out += capsys.readouterr().out
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(count) == 1
    one, two = (np.asarray(found[name].train[0].all()).tolist() for name in ("one", "two"))
    assert one == two


def test_a_copy_of_the_run_serves_elsewhere(root: Path):
    """As copy_ancestor_data copies it, from any mode."""
    for mode in ("cached", "stream"):
        first = prepare_run_data(config(root, mode, run__name=mode))
        shutil.copytree(root / "runs" / mode, root / "runs" / f"{mode}-2")
        second = prepare_run_data(config(root, mode, run__name=f"{mode}-2"))
        assert second.index == first.index
        assert second.validation[0].all().tolist() == first.validation[0].all().tolist()
