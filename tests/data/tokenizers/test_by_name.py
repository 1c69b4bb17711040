"""Each form that tokenizer.name can have."""

import os
import sys
from pathlib import Path

import pytest

from smoltrain.config import schema
from smoltrain.config.schema import TokenizerSection
from smoltrain.data.tokenizers import hub
from smoltrain.data.tokenizers.by_name import is_tokenizer_folder, load_named_tokenizer
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import UserError

SEPARATOR = "<|endoftext|>"


def section(name: str, pad: str | None = None) -> TokenizerSection:
    return TokenizerSection(name=name, pad=pad)


def problem(name: str) -> str:
    with pytest.raises(UserError) as caught:
        load_named_tokenizer(section(name))
    (only,) = caught.value.problems
    assert "\n" not in str(only)
    return str(only)


def test_a_folder_comes_before_any_other_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    local = Tokenizer.train_bpe(["a local one"], 260, SEPARATOR)
    for name in ("gpt2", "me/mine", "tiktoken:gpt2", "plain"):
        local.save(tmp_path / name)
        assert load_named_tokenizer(section(name)).fingerprint() == local.fingerprint()
    (tmp_path / "gpt2" / "tokenizer.json").unlink()  # a folder without a tokenizer is no other meaning
    assert load_named_tokenizer(section("gpt2")).num_ids == 50257


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Tokenizer.train_bpe(["a local one"], 260, SEPARATOR).save(tmp_path / "mine")
    assert is_tokenizer_folder("~/mine")
    assert load_named_tokenizer(section("~/mine")).num_ids == 260
    assert "no folder ~/other" in problem("~/other")


def test_an_unknown_name_gets_the_nearest_and_the_forms():
    assert "saw 'smollm', want 'smollm2' (the nearest valid one)" in problem("smollm")
    assert "want 'tiktoken:gpt2' (the nearest valid one)" in problem("tiktoken:gpt3")
    line = problem("qqq")
    assert "one of bpe, gpt2, smollm2, tiktoken:gpt2, a folder with tokenizer.json, or OWNER/NAME on the" in line
    assert "no folder ./nosuch" in problem("./nosuch")
    assert "no folder a/b/c" in problem("a/b/c")


def test_a_name_on_the_hub_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """tests/data/documents/test_hub.py has the Hub itself."""
    Tokenizer.train_bpe(["far away"], 260, SEPARATOR).save(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "download_tokenizer", lambda name: asked.append(name) or tmp_path / "tokenizer.json")
    assert load_named_tokenizer(section("me/mine", pad="<|pad|>")).pad_id == 260
    assert asked == ["me/mine"]


def test_pad_goes_behind_the_last_id_of_gpt2():
    padded = load_named_tokenizer(section("gpt2", pad="<|pad|>"))
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


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a/..", "no folder a/.."),
        ("a/.", "no folder a/."),
        ("../..", "no tokenizer.json in ../.."),
        ("/", "no tokenizer.json in /"),
        ("a/" + "/".join(["b"] * 40), "no folder a/b/b"),
        (LONG, "no such tokenizer: saw 'xxx"),
        (f"a/{LONG}", "xxxx..., File name too long, want a folder"),
        ("/".join([LONG] * 3), "xxxx..., File name too long, want a folder"),
        ("", "no such tokenizer: saw ''"),
        (" ", "no such tokenizer: saw ' '"),
        ("a\0b", "no such tokenizer: saw 'a"),
        ("a/b\0c", "embedded null"),  # byte, or character in path, as Python has it
        ("a/b\nc", r"no folder 'a/b\nc'"),
        ("~nobody-of-this-name/x", "want a folder with tokenizer.json"),
        ("a--b/c..d", "no folder a--b/c..d"),
    ],
)
def test_a_name_that_can_be_nothing(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "c" / "d").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "c" / "d")
    monkeypatch.setattr(hub, "download_tokenizer", lambda name: pytest.fail(f"the Hub is asked for {name!r}"))
    monkeypatch.setattr(schema, "find_path_fault", lambda _: None)  # which would refuse some of them before
    line = problem(name)
    assert words in line
    assert len(line) < 500


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Tokenizer.train_bpe(["a local one"], 260, SEPARATOR).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "no such tokenizer" in problem("")


def test_a_tokenizer_json_that_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, name = tmp_path / "mine" / "tokenizer.json", f"{tmp_path}/mine"
    file.mkdir(parents=True)
    assert f"the tokenizer cannot be read: saw tokenizer.json in {name} is no file" in problem(name)
    file.rmdir()
    os.mkfifo(file)  # nobody writes into it: who opens it waits for ever
    assert "is no file" in problem(name)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert "is no file" in problem(name)
    file.unlink()
    file.symlink_to(file)
    assert f"saw {name}, Too many levels of symbolic links, want" in problem(name)
    file.unlink()
    file.touch()
    os.truncate(file, 2**40)
    assert "has 1,099,511,627,776 bytes, want" in problem(name)
    file.unlink()

    def forbidden(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", forbidden)
    assert f"saw {name}, Permission denied, want" in problem(name)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe{\x00}\x00", b"{" * 100_000, b'{"model": {"type": "BPE"}}', b"\0" * 1000],
    ids=lambda content: repr(content[:12]),
)
def test_a_tokenizer_json_that_is_none(content: bytes, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    line = problem(str(tmp_path))
    assert "the tokenizer cannot be read: saw " in line
    assert len(line) < 500
