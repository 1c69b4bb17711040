"""No text has the id of a special token, whatever the tokenizer, its special tokens and the text."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from smoltrain.config.schema import TokenizerSection
from smoltrain.data.tokenizers.by_name import load_named_tokenizer
from smoltrain.data.tokenizers.packaged import PACKAGED_TOKENIZERS
from smoltrain.data.tokenizers.special_tokens import BYTE_LETTERS, special_token_ids
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.packing import encode_documents
from smoltrain.errors import UserError

WORDS = ("</s>", "<s>", "END", "###", "<|endoftext|>", "[SEP]", "é日")  # each is a special token, as the separator is
WIDE = "\uff1c/s\uff1e"  # NFKC makes </s> of it
LETTERS = sorted({letter for word in (*WORDS, WIDE) for letter in word} | set("ab5 .\n\u2581"))
METASPACE = decoders.Replace("\u2581", " ")


def finished(inner: tokenizers.Tokenizer, separator: str) -> Tokenizer:
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS])
    return Tokenizer(inner, separator, pad="</s>")


def trained(separator: str) -> Tokenizer:
    text = f"{separator} of act\n{separator} a {separator}{separator}, and{separator} "
    return Tokenizer.train_bpe([text * 40], 400, separator, pad="</s>" if separator != "</s>" else None)


def unigram(separator: str) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.Unigram([(word, 0.0) for word in WORDS] + [(x, -3.0) for x in LETTERS]))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = METASPACE
    return finished(inner, separator)


def with_bytes(separator: str) -> Tokenizer:
    """As Llama's: its pieces are made by merges, that of each special token too."""
    words = [*WORDS, *(f"<0x{i:02X}>" for i in range(256)), *LETTERS]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            words += [] if word[:end] in words else [word[:end]]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges)), byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence([METASPACE, decoders.ByteFallback(), decoders.Fuse()])
    return finished(inner, separator)


def whole_words(separator: str) -> Tokenizer:
    """Byte-level, and a word of the vocabulary is itself before any merge, as Llama 3 has it."""
    letters = sorted(BYTE_LETTERS)
    inner = tokenizers.Tokenizer(models.BPE({x: i for i, x in enumerate([*WORDS, *letters])}, [], ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return finished(inner, separator)


def letters(separator: str) -> Tokenizer:
    """A model of words, each of which is a letter, or a special token if that stands alone."""
    inner = tokenizers.Tokenizer(models.WordLevel({x: i for i, x in enumerate([*LETTERS, *WORDS])}, unk_token="."))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    pattern = "|".join(["END", "</s>", "<s>", "."])
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    inner.decoder = decoders.Sequence([METASPACE, decoders.Fuse()])
    return finished(inner, separator)


def lower_case(separator: str) -> Tokenizer:
    """It loses much, and makes special tokens of letters that look like theirs."""
    inner = tokenizers.Tokenizer(models.WordPiece({x: i for i, x in enumerate([*WORDS, *LETTERS])}, unk_token="."))
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return finished(inner, separator)


LOSSLESS = (trained, unigram, with_bytes, whole_words)
MADE = {make.__name__: cache(make) for make in (*LOSSLESS, letters, lower_case)}
SPOKEN = [x for x in LETTERS if x != "\u2581"]  # which stands for a space
ANY = st.lists(st.sampled_from([*WORDS, *SPOKEN, WIDE, "end", " END"]), max_size=12).map("".join)


def separators_and_documents(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int]:
    ids = [i for piece in encode_documents(enumerate(texts), tokenizer, "uint16") for i in piece.ids.tolist()]
    return ids.count(tokenizer.separator_id), len(texts)


@settings(max_examples=40)
@given(st.sampled_from(sorted(MADE)), st.sampled_from(WORDS), ANY)
def test_no_text_has_a_special_token(kind: str, separator: str, text: str):
    tokenizer = MADE[kind](separator)
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(ids)
    assert [ids] == tokenizer.encode_batch([text])
    found, documents = separators_and_documents(tokenizer, [text, separator])
    assert found == documents
    if kind in {make.__name__ for make in LOSSLESS}:
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", sorted(MADE))
@pytest.mark.parametrize("separator", WORDS)
def test_the_separator_itself_is_text(kind: str, separator: str):
    tokenizer = MADE[kind](separator)
    text = f"{separator} a{separator}{separator} <s>5</s> END\n"
    assert not tokenizer.special_ids & set(tokenizer.encode(text))
    if MADE[kind].__wrapped__ in LOSSLESS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_other_texts_have_the_ids_that_the_file_gives_them():
    tokenizer = trained("END")
    assert tokenizer._text_tokenizer is not tokenizer._inner
    texts = ["of act\n a , and" * 20, "Ünïcödé EN D and 日本語", ""]
    plain = [e.ids for e in tokenizer._inner.encode_batch(texts, add_special_tokens=False)]
    assert tokenizer.encode_batch(texts) == plain


@pytest.mark.parametrize("name", PACKAGED_TOKENIZERS)
def test_a_tokenizer_that_can_make_none_is_used_as_it_is(name: str):
    tokenizer = load_named_tokenizer(TokenizerSection(name=name))
    assert tokenizer._text_tokenizer is tokenizer._inner
    text = "".join(special_token_ids(tokenizer._inner)) * 2
    assert not tokenizer.special_ids & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_holds_after_a_round_trip_through_a_folder(tmp_path: Path):
    for separator in ("END", "###"):
        trained(separator).save(tmp_path)
        again = Tokenizer.from_folder(tmp_path, separator, "</s>")
        text = f"a{separator} {separator}"
        assert again.encode(text) == trained(separator).encode(text)
        assert again.fingerprint() == trained(separator).fingerprint()


@pytest.mark.parametrize("separator", ["|", "~", "0", "é", "Ġ"])
def test_a_separator_that_is_the_letter_of_a_byte_is_refused(separator: str):
    with pytest.raises(UserError, match=r"a sign that texts are made of: saw .*, want two characters or more"):
        Tokenizer.train_bpe(["a"], 300, separator)
    letters = {x: i for i, x in enumerate(sorted(BYTE_LETTERS))}
    inner = tokenizers.Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens([separator])
    with pytest.raises(UserError, match="a sign that texts are made of"):
        Tokenizer(inner, separator)


@pytest.mark.parametrize("separator", [" ", "\n", "日", "\u2581", "  "])
def test_other_short_separators_are_none(separator: str):
    tokenizer = Tokenizer.train_bpe([f"a{separator}b{separator * 3} c" * 50], 300, separator)
    text = f"{separator}a{separator * 5}b"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not tokenizer.special_ids & set(tokenizer.encode(text))


def unknown_is(unknown: str | None, separator: str) -> Callable[[], object]:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token=unknown or "none"))
    inner.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer(inner, separator)
    assert tokenizer.encode("a") == [0]
    return lambda: tokenizer.encode("b")


def test_an_unknown_token_is_no_separator():
    assert unknown_is("<unk>", "</s>")() == [1]
    with pytest.raises(UserError, match=r"cannot spell: saw '</s>' for it, want an unknown token that is not"):
        unknown_is("</s>", "</s>")()
    with pytest.raises(UserError, match=r"what the tokenizer cannot spell: saw .*UNK.*, want an unknown token; change"):
        unknown_is(None, "</s>")()


def test_what_transformers_makes_of_a_special_token_in_a_text(tmp_path: Path):
    tokenizer = trained("<|endoftext|>")
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "of<|endoftext|> act"
    assert tokenizer.separator_id in theirs(text)["input_ids"]
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
