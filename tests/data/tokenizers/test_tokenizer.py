"""The tokenizer: any text survives, nothing in a text can be special, and others can load it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from smoltrain.config.schema import TokenizerSection
from smoltrain.data.tokenizers.by_name import load_named_tokenizer
from smoltrain.data.tokenizers.packaged import PACKAGED_TOKENIZERS
from smoltrain.data.tokenizers.tokenizer import Tokenizer, split_text
from smoltrain.errors import UserError

SEPARATOR = "<|endoftext|>"
TEXTS = ["the cat sat on the mat. " * 20, "a    b\n\n\n  a   b\t\t a" * 20, "Ünïcödé and 日本語, a cat on a mat. " * 20]
TRAINED = Tokenizer.train_bpe(TEXTS, 300, SEPARATOR)


def problem(folder: object, separator: str = SEPARATOR) -> str:
    with pytest.raises(UserError) as caught:
        Tokenizer.from_folder(str(folder), separator)
    return str(caught.value)


def test_the_separator_is_id_0_and_the_only_special_one():
    assert TRAINED.separator_id == 0
    assert TRAINED.special_ids == {0}
    assert 257 < TRAINED.num_ids <= 300


@given(st.text())
def test_any_text_survives(text: str):
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert not TRAINED.special_ids & set(ids)
    assert [ids, ids] == TRAINED.encode_batch([text, text])


def test_a_text_cannot_forge_a_separator():
    text = f"a{SEPARATOR}b"
    assert 0 not in TRAINED.encode(text)
    assert 0 not in TRAINED.encode_batch([text])[0]
    assert TRAINED.decode(TRAINED.encode(text)) == text


@given(st.text("ab1é日 \n\t.'\u2009", max_size=60), st.integers(1, 8))
def test_pieces_have_the_ids_of_the_whole(text: str, size: int):
    cut = list(split_text(text, size))
    assert "".join(cut) == text
    assert [i for ids in TRAINED.encode_batch(cut) for i in ids] == TRAINED.encode(text)


def test_a_long_text_is_cut_into_pieces_of_about_the_size():
    *cut, rest = split_text("a few words " * 1000, 100)
    assert {len(piece) for piece in cut} <= set(range(100, 110))
    assert len(rest) < 110


def test_decoding_leaves_special_tokens_out():
    assert TRAINED.decode([0, *TRAINED.encode("the cat"), 0]) == "the cat"


def test_a_round_trip_through_a_folder(tmp_path: Path):
    TRAINED.save(tmp_path / "new")
    again = Tokenizer.from_folder(tmp_path / "new", SEPARATOR)
    assert again.fingerprint() == TRAINED.fingerprint()
    assert again.encode_batch([*TEXTS, SEPARATOR]) == TRAINED.encode_batch([*TEXTS, SEPARATOR])


def test_transformers_loads_the_folder_and_gives_the_same_ids(tmp_path: Path):
    TRAINED.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat , the mat .\n  Ünï"
    assert theirs(text)["input_ids"] == TRAINED.encode(text)
    assert theirs.decode(TRAINED.encode(text)) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.pad_token) == (SEPARATOR, 0, None)
    assert "model_max_length" not in (tmp_path / "tokenizer_config.json").read_text()


def copy(separator: str = SEPARATOR, pad: str | None = None) -> Tokenizer:
    """A tokenizer of its own, for `pad` changes what it is given."""
    return Tokenizer(tokenizers.Tokenizer.from_str(TRAINED._inner.to_str()), separator, pad)


def test_a_pad_token_gets_the_next_id_and_is_special_for_all_that_load_it(tmp_path: Path):
    padded = copy(pad="<|pad|>")
    assert (padded.pad_id, padded.num_ids) == (TRAINED.num_ids, TRAINED.num_ids + 1)
    assert padded.special_ids == {0, padded.pad_id}
    assert padded.pad_id is not None
    assert padded.unused_ids(padded.num_ids + 2) == [padded.num_ids, padded.num_ids + 1], "special tokens are tokens"
    assert padded.pad_id not in padded.encode("a<|pad|>b")
    assert padded.decode([padded.pad_id, *padded.encode("the cat<|pad|>")]) == "the cat<|pad|>"
    padded.save(tmp_path, model_max_length=77)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token, theirs.pad_token_id, theirs.model_max_length) == ("<|pad|>", padded.pad_id, 77)
    again = Tokenizer.from_folder(tmp_path, SEPARATOR, "<|pad|>")
    assert (again.pad_id, again.num_ids) == (padded.pad_id, padded.num_ids)
    assert again.fingerprint() == padded.fingerprint() != TRAINED.fingerprint()
    assert Tokenizer.train_bpe(TEXTS, 300, SEPARATOR, "<|pad|>").fingerprint() == padded.fingerprint()


def test_a_pad_token_that_is_there_is_used_as_it_is():
    same = copy(pad=SEPARATOR)
    assert same.pad_id == same.separator_id == 0
    assert same.fingerprint() == TRAINED.fingerprint()


def test_a_pad_token_that_cannot_be_one():
    with pytest.raises(UserError, match="'a', an ordinary token with id"):
        copy(pad="a")
    with pytest.raises(UserError, match="the pad token cannot be added: saw '' as id None"):
        copy(pad="")
    gaps = tokenizers.Tokenizer(models.WordLevel({"a": 0, SEPARATOR: 1, "b": 3}, unk_token="a"))
    gaps.add_special_tokens([SEPARATOR])
    with pytest.raises(UserError, match="saw '<pad>' as id 3, want id 4"):  # where "b" stands
        Tokenizer(gaps, SEPARATOR, "<pad>")


def test_a_tokenizer_that_begins_each_text_with_a_token_no_longer_does(tmp_path: Path):
    begins = tokenizers.Tokenizer.from_str(TRAINED._inner.to_str())
    begins.post_processor = TemplateProcessing(single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, 0)])
    begins.save(str(tmp_path / "tokenizer.json"))
    assert begins.encode("a cat").ids[0] == 0
    ours = Tokenizer.from_folder(tmp_path, SEPARATOR)
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("a cat")["input_ids"] == ours.encode("a cat") == TRAINED.encode("a cat")


def test_training_is_deterministic_in_another_process_with_one_thread():
    code = (
        "from smoltrain.data.tokenizers.tokenizer import Tokenizer; import sys;"
        f"print(Tokenizer.train_bpe({TEXTS!r}, 300, {SEPARATOR!r}).fingerprint())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={"RAYON_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [TRAINED.fingerprint()]
    assert done.stderr == ""


def test_truncation_and_padding_of_a_published_file_are_undone(tmp_path: Path):
    cutting = tokenizers.Tokenizer.from_str(TRAINED._inner.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=8)
    cutting.save(str(tmp_path / "tokenizer.json"))
    texts = [TEXTS[0], "a"]
    assert Tokenizer.from_folder(tmp_path, SEPARATOR).encode_batch(texts) == TRAINED.encode_batch(texts)


def test_num_ids_counts_to_the_largest_id_over_gaps():
    gaps = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 900}, unk_token="a"))
    gaps.add_special_tokens([SEPARATOR])
    assert Tokenizer(gaps, SEPARATOR).num_ids == 901


@given(st.text())
def test_the_ids_of_a_text_add_up_to_its_bytes(text: str):
    assert SIZES[TRAINED.encode(text)].sum() == len(text.encode())


@given(st.text("ab é日本語\n<0x41>") | st.text().filter(lambda text: "\u2581" not in text))
def test_the_ids_of_a_text_add_up_to_its_bytes_in_other_kinds_of_tokenizers(text: str):
    for tokenizer, sizes in OTHERS:
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("name", PACKAGED_TOKENIZERS)
def test_the_ids_of_a_text_add_up_to_its_bytes_in_the_real_tokenizers(name: str):
    tokenizer = load_named_tokenizer(TokenizerSection(name=name))
    sizes = tokenizer.bytes_per_id()
    texts = [*TEXTS, SEPARATOR, "".join(map(chr, range(0x3000))), "    12 345\r\n👩‍👩‍👧"]
    lost = (
        dict.fromkeys(map(ord, "\x04\x06\x13\x14\x16\x1d")) if name == "smollm2" else {}
    )  # bytes that it has no id for
    have = [len(text.translate(lost).encode()) for text in texts]
    assert [sizes[ids].sum() for ids in tokenizer.encode_batch(texts)] == have


def test_ids_that_stand_for_no_text_have_no_bytes():
    padded = copy(pad="<|pad|>")
    assert padded.bytes_per_id()[[padded.separator_id, padded.pad_id]].tolist() == [0, 0]
    assert padded.bytes_per_id().shape == (padded.num_ids,)
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b\u2581é": 900}, unk_token="a"))
    inner.add_special_tokens([SEPARATOR])
    sizes = Tokenizer(inner, SEPARATOR).bytes_per_id()
    assert np.flatnonzero(sizes).tolist() == [0, 900], "a gap is no text"
    assert sizes[[0, 900]].tolist() == [1, 4]


def with_bytes() -> Tokenizer:
    """In the manner of Llama 2: U+2581 for a space, and bytes for the characters that the vocabulary lacks."""
    words = [SEPARATOR, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "é", "\u2581a", "ab", "日"]
    merges = [("\u2581", "a"), ("a", "b")]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([SEPARATOR])
    return Tokenizer(inner, SEPARATOR)


def with_words_added() -> Tokenizer:
    """In the manner of GPT-NeoX: byte-level, with runs of spaces and a word beside it, as they are spelled."""
    inner = tokenizers.Tokenizer.from_str(TRAINED._inner.to_str())
    inner.add_tokens(["  ", "    ", "日本"])
    inner.decoder = decoders.Sequence([decoders.ByteLevel()])
    return Tokenizer(inner, SEPARATOR)


SIZES = TRAINED.bytes_per_id()
OTHERS = [(tokenizer, tokenizer.bytes_per_id()) for tokenizer in (with_bytes(), with_words_added())]


def test_missing_folder_missing_file_broken_file(tmp_path: Path):
    assert f"no folder {tmp_path / 'none'}" in problem(tmp_path / "none")
    assert "no tokenizer.json in" in problem(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be read" in problem(tmp_path)


def test_an_unknown_separator_names_those_that_exist(tmp_path: Path):
    TRAINED.save(tmp_path)
    assert f"saw '</s>', want one of {SEPARATOR}; change tokenizer.separator" in problem(tmp_path, "</s>")
    assert "not a special token" in problem(tmp_path, "a")
