"""One bit of the tokens that is not as it was: found at the next start, and made anew or refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.schema import Config
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import check_tokens
from smoltrain.data.tokens import tokenise as tokenise_module
from smoltrain.data.tokens.index import data_index_file
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.errors import UserError
from tests.data.tokens.test_prepare import config, mixed, twelve
from tests.data.tokens.test_tokenise import contents, problem


@pytest.fixture
def root(tmp_path: Path):
    return twelve(tmp_path)


def flip(path: Path, place: int = 5) -> None:
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] ^= 4
    path.write_bytes(raw)


def tokens_of(prepared: PreparedData) -> list[list[int]]:
    return [side.all().tolist() for side in (*prepared.train, *prepared.validation)]


@pytest.mark.parametrize("kind", [".bin", ".starts", ".hashes"])
@pytest.mark.parametrize("mode", ["cached", "stream", "shared"])
def test_a_flipped_bit_is_named_and_made_anew(root: Path, mode: str, kind: str, capsys: pytest.CaptureFixture[str]):
    changes = {"data__cache": root / "cache"} if mode == "shared" else {}
    settings = config(root, "auto" if mode == "shared" else mode, **changes)
    prepare_run_data(settings)
    home = root / "cache" if mode == "shared" else settings.run_folder
    before = contents(home)
    for path in home.rglob(f"validation*{kind}"):
        flip(path)
    capsys.readouterr()
    prepare_run_data(settings)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("data: data/validation")
    assert f"{kind} is damaged (other bytes than were written (SHA-256 differs)); it is made anew" in line
    assert contents(home) == before


def test_a_new_run_looks_at_a_cache_before_it_uses_it(root: Path, capsys: pytest.CaptureFixture[str]):
    first = tokens_of(prepare_run_data(config(root, "auto", data__cache=root / "cache")))
    flip(next((root / "cache").rglob("train-*.bin")))
    second = prepare_run_data(config(root, "auto", run__name="second", data__cache=root / "cache"))
    assert "data/train-00000.bin is damaged" in capsys.readouterr().out
    assert tokens_of(second) == first


def test_only_the_damaged_source_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch):
    settings = mixed(root, "cached")
    first = tokens_of(prepare_run_data(settings))
    flip(settings.run_folder / "data" / "code" / "train.starts")
    asked: list[str] = []
    tokenise = tokenise_module.tokenise_sources

    def listen(only: Config, *rest: Any) -> dict[str, Any]:
        asked.extend(part.name for part in only.data.parts)
        return tokenise(only, *rest)

    monkeypatch.setattr(tokenise_module, "tokenise_sources", listen)
    assert tokens_of(prepare_run_data(settings)) == first
    assert asked == ["code"]


def test_a_tail_that_is_held_out_comes_back_too(root: Path):
    shutil.rmtree(root / "source")
    (root / "source").mkdir()
    (root / "source" / "only.txt").write_text("This is the one document. " * 400)
    settings = config(root, "cached")
    first = tokens_of(prepare_run_data(settings))
    flip(settings.run_folder / "data" / "data" / "whole-00000.bin")
    flip(settings.run_folder / "data" / "data" / "whole.hashes")
    assert tokens_of(prepare_run_data(settings)) == first


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_what_cannot_be_made_anew_is_refused_and_left(root: Path, mode: str):
    settings = config(root, mode, data__allow_changed=True)
    prepare_run_data(settings)
    for shard in (root / "source").iterdir():
        lines = [json.loads(line)["text"] for line in shard.read_text().splitlines()]
        shard.write_text("".join(json.dumps({"text": text.replace("This", "That")}) + "\n" for text in lines))
    flip(settings.run_folder / "data" / "data" / "validation-00000.bin")
    before = contents(settings.run_folder / "data" / "data")
    line = problem(settings)
    assert line.startswith("data/validation-00000.bin is damaged: saw other bytes")
    assert "the documents of 'data' no longer give the same tokens" in line
    assert contents(settings.run_folder / "data" / "data") == before


def test_a_source_that_is_gone_is_said(root: Path):
    settings = config(root, "cached")
    prepared = prepare_run_data(settings)
    flip(settings.run_folder / "data" / "data" / "train-00000.bin")
    shutil.rmtree(root / "source")
    with pytest.raises(UserError, match=r"data/train-00000.bin is damaged.*cannot be read again") as caught:
        check_tokens.repair_tokens(settings, prepared.index, settings.run_folder / "data", {}, prepared.tokenizer)
    assert len(caught.value.problems) == 1


def test_what_stands_beside_the_tokenizer_is_written_anew(root: Path, capsys: pytest.CaptureFixture[str]):
    settings = config(root, "cached")
    prepare_run_data(settings)
    path = settings.run_folder / "tokenizer" / "tokenizer_config.json"
    before = path.read_bytes()
    flip(path)
    prepare_run_data(settings)
    assert "tokenizer_config.json (other bytes" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_large_tokens_say_that_they_are_looked_at(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = config(root, "cached")
    prepare_run_data(settings)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(check_tokens, "REPORTED_BYTES", 1)
    prepare_run_data(settings)
    assert "GiB of tokens looked at for damage in 0 s" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_a_pipe_in_the_place_of_a_file_is_no_file(root: Path, mode: str):
    settings = config(root, mode)
    prepare_run_data(settings)
    path = settings.run_folder / "data" / "data" / "validation.starts"
    path.unlink()
    os.mkfifo(path)
    prepare_run_data(settings)
    assert path.is_file()
    index = data_index_file(settings.run_folder)
    index.unlink()
    os.mkfifo(index)
    assert "the index of the data is damaged: saw no regular file" in problem(settings)


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("data/index.json", "the index of the data is damaged"),
        ("tokenizer/tokenizer.json", "the run's tokenizer has changed"),
    ],
)
def test_damage_is_found(root: Path, file: str, shown: str):
    settings = config(root, "cached")
    prepare_run_data(settings)
    path = settings.run_folder / file
    if path.name == "tokenizer.json":
        Tokenizer.train_bpe(["other"], 260, "<|endoftext|>").save(path.parent)
    else:
        path.write_bytes(path.read_bytes()[:-2])
    assert shown in problem(settings)
