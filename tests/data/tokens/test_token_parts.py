"""Parts of the tokens: a killed preparation goes on with whole ones."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltrain import files
from smoltrain.data.documents import retry
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import token_parts
from smoltrain.data.tokens import tokenise as tokenise_module
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.token_files import content_hash
from tests.data.tokens.test_tokenise import contents, given, make


def test_the_tail_of_many_parts(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Three files whose names the hash all puts on one side, each of them a part."""
    monkeypatch.setattr(token_parts, "PART_BYTES", 1)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    names = [f"{i:03}.txt" for i in range(100) if not is_held_out(f"{i:03}.txt", 0.3)][:3]
    for path in (root / "source").iterdir():
        path.unlink()
    for i, name in enumerate(names):
        (root / "source" / name).write_text(f"number {i} " * 50 * (i + 1))
    prepared = prepare_run_data(make(root))
    (train,), (validation,) = prepared.train, prepared.validation
    assert len(prepared.index.sources["data"].validation.files) == 6
    ids = np.concatenate([train.all(), validation.all()])
    ends = np.flatnonzero(ids == prepared.tokenizer.separator_id)
    assert len(ends) == 3
    cut = len(train)
    assert ends[1] < cut < ends[2]  # in the last document, which is half of all
    assert train.starts.tolist() == [0, ends[0] + 1, ends[1] + 1]
    assert validation.starts.tolist() == [0]
    assert validation.hashes.tolist() == train.hashes[2:].tolist()
    everything = train.read_rows(np.arange(cut - 9), 10)
    assert (everything == np.lib.stride_tricks.sliding_window_view(ids[:cut], 10)).all()


def test_a_kill_before_any_rename_leaves_nothing_that_harms(root: Path, monkeypatch: pytest.MonkeyPatch):
    """What the disk holds before each rename is what a kill there would leave: prepare again from each such state."""
    monkeypatch.setattr(token_parts, "PART_BYTES", 1500)  # three parts
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    config, states = make(root), []
    commit = files.commit_file

    def recording(written: Path, final: Path) -> None:
        states.append(shutil.copytree(config.run_folder, root / f"state{len(states)}"))
        commit(written, final)

    monkeypatch.setattr(files, "commit_file", recording)
    prepare_run_data(config)
    monkeypatch.setattr(files, "commit_file", commit)
    whole = contents(config.run_folder)
    # Of each part and side 4 files, and a record; of each side 3; the index.
    assert len(states) == 3 * (2 * 4 + 1) + 2 * 3 + 1
    for state in states:
        shutil.rmtree(config.run_folder)
        shutil.move(state, config.run_folder)
        leftovers = [path for end in ("*.partial", "*.tmp") for path in config.run_folder.rglob(end)]
        for leftover in (*leftovers, *config.run_folder.glob("tokenizer/*")):
            leftover.write_bytes(leftover.read_bytes()[:7])  # and cut short by a power failure
        prepare_run_data(config)
        assert contents(config.run_folder) == whole


def test_a_killed_prepare_goes_on_with_the_parts_that_are_whole(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_parts, "PART_BYTES", 1500)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    read, tokenise = retry.read_records_with_retry, token_parts.TokeniseJob.tokenise_part
    opened: list[str] = []

    def dying(work: token_parts.TokeniseJob, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        tokenise(work, number)

    def counting(shard: Any, *rest: Any, **options: Any) -> Any:
        opened.append(shard.name)
        return read(shard, *rest, **options)

    monkeypatch.setattr(retry, "read_records_with_retry", counting)
    prepare_run_data(given(root, run__name="straight"))
    straight = contents(root / "runs" / "straight")
    assert len(opened) == 20
    monkeypatch.setattr(token_parts.TokeniseJob, "tokenise_part", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare_run_data(given(root))
    monkeypatch.setattr(token_parts.TokeniseJob, "tokenise_part", tokenise)
    folder = root / "runs" / "run" / "data" / "data"
    for damage in ("none", "cut", "altered", "settings"):
        work = root / "runs" / damage
        shutil.copytree(root / "runs" / "run", work)
        second = work / "data" / "data" / "train-00001.bin"
        raw = second.read_bytes()
        if damage == "cut":
            second.write_bytes(raw[:-2])
        elif damage == "altered":
            second.write_bytes(b"\1" + raw[1:])
        opened.clear()
        if damage == "settings":
            prepare_run_data(given(root, run__name=damage, data__max_document_mib=1))
            assert len(opened) == 20
            continue
        prepare_run_data(given(root, run__name=damage))
        assert len(opened) == (4 if damage == "none" else 12), damage
        assert contents(work) == straight
    assert (folder / "part-00001.json").exists()


def test_the_plan_of_the_parts_is_a_function_of_the_shards_alone(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_parts, "PART_BYTES", 1000)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    about = prepare_run_data(given(root)).index.sources["data"].train
    assert about is not None
    sizes = [path.stat().st_size for path in sorted((root / "source").iterdir())]
    assert sizes == [210] * 20  # so five files are a part
    assert [name for name in about.files if name.endswith(".bin")] == [f"train-{i:05}.bin" for i in range(4)]


def test_a_part_behind_other_shards_than_before_is_made_anew(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Its own shards are the same, but the addresses of its documents hold their numbers among all shards."""
    monkeypatch.setattr(token_parts, "PART_BYTES", 300)  # two files a part
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    join = tokenise_module._join_source
    monkeypatch.setattr(tokenise_module, "_join_source", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_run_data(given(root))
    monkeypatch.setattr(tokenise_module, "_join_source", join)
    (root / "source" / "00.txt").unlink()
    (root / "source" / "01.txt").write_text("This is document 01. " * 20)  # a part of its own now
    for tokens in (*(prepared := prepare_run_data(given(root))).train, *prepared.validation):
        for number, hashed in enumerate(tokens.hashes.tolist()):
            assert content_hash((root / "source" / tokens.document_address(number)).read_text()) == hashed
