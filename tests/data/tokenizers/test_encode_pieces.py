"""Long texts are cut, in training and in encoding: neither time nor memory runs away, and nothing else changes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from smoltrain.config.schema import TokenizerSection
from smoltrain.data.tokenizers import tokenizer
from smoltrain.data.tokenizers.by_name import load_named_tokenizer
from smoltrain.data.tokenizers.packaged import PACKAGED_TOKENIZERS
from smoltrain.data.tokenizers.round_trip import LOST_SHARE_TO_WARN
from smoltrain.data.tokenizers.special_tokens import BYTE_LETTERS
from smoltrain.data.tokenizers.tokenizer import MAX_TRAINING_WORD, Tokenizer, build_byte_level_bpe, split_text
from smoltrain.data.tokenizers.train_bpe import MAX_DISTINCT_BYTES
from smoltrain.data.tokens import packing

SEPARATOR = "<|endoftext|>"
RUNS = {
    "genome": "ACGT", "hanzi": "的一是不", "a letter": "a", "digits": "0123456789", "signs": "=", "newlines": "\n",
    "NULs": "\0", "spaces": " ", "marks": "\u0301", "base64": "aB3/", "apostrophes": "'",
    "separators of fields": "!\x1c",
}  # fmt: skip
ENGLISH = "It was the best of times, it was the worst of times; 1859! " * 40
CHINESE = "我们今天去看电影。你呢\uff1f不去\uff01\n" * 40  # no space anywhere


def run(letters: str, length: int) -> str:
    return (letters * (length // len(letters) + 1))[:length]


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seams are looked for in 50 characters only."""
    monkeypatch.setattr(tokenizer, "SEAM_SEARCH_CHARACTERS", 50)


@pytest.mark.parametrize("letters", RUNS.values(), ids=RUNS)
def test_no_text_makes_a_long_piece(letters: str, close: None):
    text = run(letters, 5000)
    cut = list(split_text(text, 100))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 150
    assert len(cut) >= 5000 // 150


def test_what_is_tokenised_at_once_is_bounded_for_any_text(monkeypatch: pytest.MonkeyPatch, close: None):
    given_texts: list[list[str]] = []
    recording = Tokenizer.train_bpe(["x"], 257, SEPARATOR)
    encode = recording.encode_batch
    monkeypatch.setattr(
        recording, "encode_batch", lambda texts, *rest: given_texts.append(texts) or encode(texts, *rest)
    )
    monkeypatch.setattr(packing, "ENCODE_CHARACTERS", 100)
    texts = [run(letters, 3000) for letters in RUNS.values()]
    for _ in packing.encode_documents(enumerate(texts), recording, np.uint16, 200):
        pass
    assert max(sum(map(len, batch)) for batch in given_texts) <= 200 + 150
    assert max(len(text) for batch in given_texts for text in batch) <= 150


@pytest.mark.parametrize("name", [*PACKAGED_TOKENIZERS, "trained"])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE, ENGLISH + CHINESE], ids=["English", "Chinese", "both"])
def test_pieces_of_ordinary_texts_have_the_ids_of_the_whole(name: str, text: str, close: None):
    trained = Tokenizer.train_bpe([ENGLISH, CHINESE], 400, SEPARATOR)  # it has the words of both
    tokenizer = trained if name == "trained" else load_named_tokenizer(TokenizerSection(name=name))
    for size in (10, 77, 300):
        cut = list(split_text(text, size))
        assert len(cut) > 1
        assert list(itertools.chain.from_iterable(tokenizer.encode_batch(cut))) == tokenizer.encode(text)


def other(kind: str) -> Tokenizer:
    """Tokenizers that begin a text in a way of their own."""
    letters = [SEPARATOR, "\u2581", *sorted(BYTE_LETTERS | set(CHINESE))]
    inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind == "Llama 2":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif kind == "Metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    elif kind == "strips":
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first")])
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens([SEPARATOR])
    return Tokenizer(inner, SEPARATOR)


OTHERS = {kind: other(kind) for kind in ("Llama 2", "Metaspace", "strips", "byte-level")}


@pytest.mark.parametrize("kind", OTHERS)
@given(text=st.lists(st.sampled_from(["a", "b", "。", " ", "\n", "a b", "A"]), max_size=100).map("".join))
def test_no_piece_begins_as_a_document_does(kind: str, text: str):
    if kind == "strips":  # which loses spaces wherever it is cut anywhere among them
        text = " ".join(text.split()) + " "
    before = tokenizer.SEAM_SEARCH_CHARACTERS, packing.ENCODE_CHARACTERS
    tokenizer.SEAM_SEARCH_CHARACTERS, packing.ENCODE_CHARACTERS = 20, 10
    try:
        found = list(packing.encode_documents([(0, text), (1, text)], OTHERS[kind], np.uint16, 30))
    finally:
        tokenizer.SEAM_SEARCH_CHARACTERS, packing.ENCODE_CHARACTERS = before
    ids = np.concatenate([piece.ids for piece in found]).tolist()
    whole = [*OTHERS[kind].encode(text), OTHERS[kind].separator_id]
    assert ids == whole * 2, "no merges: so even where it is cut anywhere"


# ---- training


@pytest.mark.parametrize("letters", RUNS.values(), ids=RUNS)
def test_a_bpe_is_trained_on_words_of_bounded_length(letters: str):
    trained = Tokenizer.train_bpe([run(letters, 20_000)], 300, SEPARATOR)
    (longest,) = {max(len(word) for word in trained._inner.get_vocab() if word != SEPARATOR)}
    assert longest <= MAX_TRAINING_WORD
    if len(letters) == 1 and len(letters.encode()) == 1:
        assert longest == MAX_TRAINING_WORD, "a run of one letter doubles up to it"
    text = run(letters, 1000)
    assert trained.decode(trained.encode(text)) == text


def test_ordinary_texts_train_the_tokenizer_that_they_always_did():
    texts = [ENGLISH, CHINESE, "x" * MAX_TRAINING_WORD, "=" * 80 + "\n" + " " * 200]
    inner = build_byte_level_bpe(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, plain)
    assert Tokenizer.train_bpe(texts, 400, SEPARATOR).fingerprint() == Tokenizer(inner, SEPARATOR).fingerprint()


def test_the_limits_are_those_of_the_page_about_data():
    page = " ".join((Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8").split())
    assert f"if there is neither in {tokenizer.SEAM_SEARCH_CHARACTERS:,} characters" in page
    assert f"a word is cut at {MAX_TRAINING_WORD} bytes" in page
    assert f"different words come to more than {MAX_DISTINCT_BYTES // 2**20} MiB" in page
    assert f"from {LOST_SHARE_TO_WARN * 100:g} % on there is a warning" in page
