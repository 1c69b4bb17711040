"""No text is trained on that is validated on, however its documents are called: by content, in both modes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltrain.config.schema import Config
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import token_parts, tokenise
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.token_files import content_hash
from smoltrain.errors import UserError
from tests.data.documents import texts as folder_of_texts
from tests.data.tokens.test_tokenise import contents, problem, split
from tests.data.worlds import World, section, streamed, write

text = folder_of_texts.text
SHARE = 0.3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tokenizer in `given`."""
    Tokenizer.train_bpe([text(12)], 270, "<|endoftext|>").save(tmp_path / "given")
    return tmp_path


def write_texts(folder: Path, texts: list[str], begin: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(texts):
        (folder / f"{begin}{i:02}.txt").write_text(one)
    return folder


def config(root: Path, *folders: str, mode: str = "cached", **changes: Any) -> Config:
    parts = [{"name": name, "path": str(root / name), "weight": 1.0} for name in folders]
    parts = [part | changes.pop(f"{part['name']}_more", {}) for part in parts]
    return folder_of_texts.config(root, mode, data__path=None, data__sources=parts, **changes)


def assert_apart(prepared: PreparedData) -> None:
    """What is validated on is not trained on; what is cut is on both sides, with different tokens."""
    for number, train in enumerate(prepared.train):
        for other, validation in enumerate(prepared.validation):
            common = np.intersect1d(train.hashes, validation.hashes)
            cut = train.hashes[-1:] if number == other else np.empty(0, np.uint64)
            assert set(common.tolist()) <= set(cut.tolist())


def test_copies_under_other_names_are_left_out_and_counted(root: Path, capsys: Any):
    texts = [text(i) for i in range(20)]
    write_texts(root / "web", texts)
    write_texts(root / "web", texts, "copy-")
    prepared = prepare_run_data(config(root, "web"))
    train, validation = split(prepared, prepared.train[0]), split(prepared, prepared.validation[0])
    held = {texts[i] for name in ("", "copy-") for i in range(20) if is_held_out(f"{name}{i:02}.txt", SHARE)}
    assert set(validation) == held
    assert sorted(train) == sorted(one for one in 2 * texts if one not in held)
    copies = 40 - len(train) - len(validation)
    assert prepared.index.sources["web"].copies == copies > 0
    num_repeated = len(train) - len(set(train))
    assert prepared.index.sources["web"].repeated == num_repeated > 0
    assert f" of {len(train)} documents ({num_repeated} of which repeat another); " in prepared.describe()
    assert f"data: {copies} documents of web are not trained on: the text is held out" in capsys.readouterr().out
    assert f"; {copies} copies of held-out documents left out" in prepared.describe()
    assert_apart(prepared)


def test_a_copy_of_what_validation_path_names_is_left_out_of_every_source(root: Path):
    write_texts(root / "a", [text(i) for i in range(8)])
    write_texts(root / "b", [text(i) for i in (5, 6, *range(20, 40))])
    write_texts(root / "valid", [text(5), text(6)])
    more = {"validation_path": str(root / "valid")}
    prepared = prepare_run_data(config(root, "a", "b", a_more=more))
    assert sorted(split(prepared, prepared.train[0])) == [text(i) for i in (0, 1, 2, 3, 4, 7)]
    assert_apart(prepared)
    for number in range(2):
        assert not {text(5), text(6)} & set(split(prepared, prepared.train[number]))


@pytest.mark.parametrize("part_bytes", [1, 500, 2**20])
def test_the_bytes_do_not_depend_on_the_parts(root: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch):
    texts = [text(i % 12) for i in range(30)]
    write_texts(root / "web", texts)
    monkeypatch.setattr(tokenise, "num_cores", lambda: 1)
    whole = prepare_run_data(config(root, "web"))
    monkeypatch.setattr(token_parts, "PART_BYTES", part_bytes)
    parts = prepare_run_data(config(root, "web", run__name="parts"))
    assert parts.train[0].all().tolist() == whole.train[0].all().tolist()
    assert parts.train[0].starts.tolist() == whole.train[0].starts.tolist()
    assert parts.train[0].hashes.tolist() == [content_hash(one) for one in split(parts, parts.train[0])]
    assert not list(root.rglob("*.partial"))
    named = {name for side in parts.index.sources["web"].sides for name in side.files}
    assert {Path(name).name for name in contents(root / "runs" / "parts") if "/web/" in name} == named


def test_a_restart_leaves_out_what_is_held_out_now(root: Path, monkeypatch: pytest.MonkeyPatch):
    """A part that is whole already was made without knowing what other sources hold out."""
    write_texts(root / "a", [text(i) for i in range(12)])
    write_texts(root / "b", [text(i) for i in range(20, 32)])
    write_texts(root / "valid", [text(3)])
    monkeypatch.setattr(tokenise, "_join_source", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_run_data(config(root, "a", "b", b_more={"validation_path": str(root / "valid")}))
    monkeypatch.undo()
    write_texts(root / "valid", [text(4)])
    prepared = prepare_run_data(config(root, "a", "b", b_more={"validation_path": str(root / "valid")}))
    assert text(4) not in split(prepared, prepared.train[0])
    fresh = config(root, "a", "b", b_more={"validation_path": str(root / "valid")}, run__name="fresh")
    assert prepared.train[0].all().tolist() == prepare_run_data(fresh).train[0].all().tolist()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=3),
    own=st.none() | st.integers(0, 6),
)
def test_whatever_is_equal_to_whatever(root: Path, texts: list[list[int]], own: int | None):
    """Few documents, so that some sources hold out a tail; in any of them any text may be that of any other."""
    for name in ("a", "b", "c", "runs", "valid"):
        shutil.rmtree(root / name, ignore_errors=True)
    folders = "abc"[: len(texts)]
    for name, numbers in zip(folders, texts, strict=True):
        write_texts(root / name, [text(i) + text(i) * (i % 3) for i in numbers])
    more: dict[str, Any] = {}
    if own is not None:
        write_texts(root / "valid", [text(own) + text(own) * (own % 3)])
        more = {"a_more": {"validation_path": str(root / "valid")}}
    refused = None
    try:
        prepared = prepare_run_data(config(root, *folders, **more))
        assert_apart(prepared)
    except UserError as error:
        refused = str(error)
    assert refused is None or "has no document to train on" in refused or "too few" in refused


def test_a_copy_of_a_single_text_is_not_trained_on(root: Path):
    book = "".join(f"line {i}\n" for i in range(400))
    write_texts(root / "a", [book])
    write_texts(root / "b", [book, *(text(i) for i in range(9))])
    prepared = prepare_run_data(config(root, "a", "b"))
    assert [prepared.index.sources[name].held_out for name in "ab"] == ["tail", "documents"]
    assert [prepared.index.sources[name].copies for name in "ab"] == [0, 1]
    assert book not in split(prepared, prepared.train[1])
    assert_apart(prepared)
    write_texts(root / "c", [book])
    line = problem(config(root, "a", "c", run__name="other"))
    assert line.startswith("the source 'c' has no document to train on: saw 1, all of them held out")


def test_all_that_is_left_is_held_out(root: Path):
    write_texts(root / "web", [text(1)] * 20)
    line = problem(config(root, "web"))
    assert line.startswith("the source 'web' has no document to train on: saw ")
    assert "all of them held out" in line


@pytest.mark.parametrize("single", [False, True])
def test_documents_are_found_again_among_left_out_ones(root: Path, single: bool):
    """The numbers of training documents do not count what was left out, nor a file that was."""
    texts = ["".join(f"line {i}\n" for i in range(400))] if single else [text(i) for i in range(20)]
    write_texts(root / "web", texts)
    write_texts(root / "web", texts, "copy-" if not single else "x-")
    write_texts(root / "web", [text(50)], "00-held-")
    settings_ = config(root, "web", web_more={"validation_path": str(root / "web" / "00-held-*")} if single else {})
    prepare_run_data(settings_)
    loader = open_loader(settings_, 0, 1, rows_per_step=4, accumulation=2)
    found = set()
    for _ in range(12):
        taken = loader.fetch_step_rows()
        for row in loader.hold_rows()():
            for passage in row.passages:
                assert passage.number is not None
                one = (root / "web" / passage.address).read_text()
                assert content_hash(one) == int(loader.prepared.train[0].hashes[passage.number])
                found.add(passage.address)
        loader.mark_consumed(loader.unpack_totals(taken.counts))
    assert len(found) > (1 if single else 10)


# ---- streams


def test_streams_leave_out_what_is_validated_on(tmp_path: Path):
    texts = [[f"<{i}.{j}>" * 3 for j in range(6)] for i in range(8)]
    texts[3][2] = texts[5][1] = texts[0][4]
    folders = {"s0": write(tmp_path / "a", texts)}
    held = frozenset({content_hash(texts[0][4]), content_hash(texts[6][0])})
    world = World(streamed(folders, 4), 2, section(folders), held_out=held)
    world.steps(40)
    assert world.ranks[0].unique_documents == 48 - 4
    notes = [note for rank in world.ranks for note in rank.health.take_notes()]
    assert [note for note in notes if "their texts are held out" in note]
    assert len(notes) <= len(world.ranks)
    world.close()


def test_a_streamed_run_does_not_train_on_copies_of_what_it_validates_on(root: Path):
    texts = [text(i) for i in range(20)]
    write_texts(root / "web", texts)
    write_texts(root / "web", texts, "copy-")
    settings_ = config(root, "web", mode="stream")
    prepared = prepare_run_data(settings_)
    validated = {int(hashed) for hashed in prepared.validation[0].hashes}
    loader = open_loader(settings_, 0, 1, rows_per_step=4, accumulation=2)
    begun: set[int] = set()
    for _ in range(120):
        taken = loader.fetch_step_rows()
        addresses = {passage.address for row in loader.hold_rows()() for passage in row.passages}
        begun |= {content_hash((root / "web" / address).read_text()) for address in addresses}
        loader.mark_consumed(loader.unpack_totals(taken.counts))
    loader.close()
    assert len(begun) > 10
    assert not begun & validated


def test_a_stream_of_nothing_but_copies_is_refused(tmp_path: Path):
    texts = [["same"] * 3 for _ in range(4)]
    folders = {"s0": write(tmp_path / "a", texts)}
    world = World(streamed(folders, 2), 1, section(folders), held_out=frozenset({content_hash("same")}))
    with pytest.raises(UserError, match=r"stream \d of the source 's0' has no document to train on"):
        world.step()
    world.close()
