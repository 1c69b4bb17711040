"""Each form that tokenizer.name can have."""

import sys
from pathlib import Path

import pytest

from smoltrain.data import hub, naming
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.errors import UserError
from smoltrain.schema import TokenizerSection

SEPARATOR = "<|endoftext|>"


def section(name: str, pad: str | None = None) -> TokenizerSection:
    return TokenizerSection(name=name, pad=pad)


def problem(name: str) -> str:
    with pytest.raises(UserError) as caught:
        naming.named(section(name))
    (only,) = caught.value.problems
    assert "\n" not in str(only)
    return str(only)


def test_a_folder_comes_before_any_other_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    local = Tokenizer.train_bpe(["a local one"], 260, SEPARATOR)
    for name in ("gpt2", "me/mine", "tiktoken:gpt2", "plain"):
        local.save(tmp_path / name)
        assert naming.named(section(name)).fingerprint() == local.fingerprint()
    (tmp_path / "gpt2" / "tokenizer.json").unlink()  # a folder without a tokenizer is no other meaning
    assert naming.named(section("gpt2")).num_ids == 50257


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Tokenizer.train_bpe(["a local one"], 260, SEPARATOR).save(tmp_path / "mine")
    assert naming.is_folder("~/mine")
    assert naming.named(section("~/mine")).num_ids == 260
    assert "no folder ~/other" in problem("~/other")


def test_an_unknown_name_gets_the_nearest_and_the_forms():
    assert "saw 'smollm', want 'smollm2' (the nearest valid one)" in problem("smollm")
    assert "want 'tiktoken:gpt2' (the nearest valid one)" in problem("tiktoken:gpt3")
    line = problem("qqq")
    assert "one of bpe, gpt2, smollm2, tiktoken:gpt2, a folder with tokenizer.json, or OWNER/NAME on the" in line
    assert "no folder ./nosuch" in problem("./nosuch")
    assert "no folder a/b/c" in problem("a/b/c")


def test_a_name_on_the_hub_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """tests/data/test_hub.py has the Hub itself."""
    Tokenizer.train_bpe(["far away"], 260, SEPARATOR).save(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "tokenizer_file", lambda name: asked.append(name) or tmp_path / "tokenizer.json")
    assert naming.named(section("me/mine", pad="<|pad|>")).pad_id == 260
    assert asked == ["me/mine"]


def test_pad_goes_behind_the_last_id_of_gpt2():
    padded = naming.named(section("gpt2", pad="<|pad|>"))
    assert (padded.pad_id, padded.separator_id, padded.num_ids) == (50257, 50256, 50258)


def test_tiktoken_that_is_not_installed_or_not_reachable(monkeypatch: pytest.MonkeyPatch):
    def unreachable(name: str) -> None:
        try:
            raise OSError(-2, "Name or service not known")
        except OSError as error:
            raise ConnectionError("HTTPSConnectionPool(...): Max retries exceeded with url ...") from error

    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    line = problem("tiktoken:gpt2")
    assert "tiktoken cannot load its GPT-2: saw [Errno -2] Name or service not known, want" in line
    assert "or tokenizer=gpt2, which has the same ids; change tokenizer.name" in line
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "tiktoken is not installed: saw 'tiktoken:gpt2', want `pip install tiktoken`, or" in problem("tiktoken:gpt2")
