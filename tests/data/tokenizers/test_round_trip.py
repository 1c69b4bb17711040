"""What a tokenizer cannot spell is measured and said, and bits per byte count it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from pydantic import ValidationError
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from smoltrain.config.schema import Config
from smoltrain.data.tokenizers import round_trip
from smoltrain.data.tokenizers.round_trip import RoundTripCounter, RoundTripCounts
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.index import DataIndex, IndexFingerprint, IndexSource
from smoltrain.data.tokens.packing import encode_documents
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.token_files import content_hash
from tests.data.tokens.test_prepare import config, write
from tests.data.tokens.test_tokenise import given, twenty

SEPARATOR = "<|endoftext|>"
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
CYRILLIC = "Король сказал: abc. "  # 22 of its 33 bytes are letters that the tokenizers below lack
LOSSLESS = Tokenizer.train_bpe([CYRILLIC], 300, SEPARATOR)


def letters_only(*, unknown: str | None, special: bool = True, lower: bool = False) -> Tokenizer:
    """It knows a-z and the space alone."""
    words = [SEPARATOR, *([unknown] if unknown else []), *LETTERS, "\u2581"]
    inner = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token=unknown))
    if lower:
        inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens([AddedToken(w, special=True) for w in words[: 2 if unknown and special else 1]])
    return Tokenizer(inner, SEPARATOR)


TOKENIZERS = {
    "lossless": LOSSLESS,
    "a special unknown token": letters_only(unknown="<unk>"),
    "an unknown token": letters_only(unknown="<unk>", special=False),
    "dropped": letters_only(unknown=None),
    "lower case": letters_only(unknown=None, lower=True),
}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    twenty(tmp_path)
    for number, path in enumerate(sorted((tmp_path / "source").iterdir())):
        path.write_text(CYRILLIC * (3 + number % 4) + "Ж" * number)
    return tmp_path


def prepared_by(tokenizer: Tokenizer, root: Path, made: Config) -> PreparedData:
    tokenizer.save(root / "given")
    return prepare_run_data(made)


@KINDS
def test_the_ids_of_the_validation_texts_add_up_to_their_bytes(kind: str, root: Path):
    prepared = prepared_by(TOKENIZERS[kind], root, given(root, model__vocab_size=400))
    (held,) = prepared.validation
    known = set(held.hashes.tolist())
    texts = [path.read_text() for path in (root / "source").iterdir()]
    num_bytes = sum(len(text.encode()) for text in texts if content_hash(text) in known)
    sizes = prepared.bytes_per_id()
    assert sizes[held.all()].sum() == pytest.approx(num_bytes)
    assert sizes[prepared.tokenizer.separator_id] == 0
    if kind == "lossless":
        assert (sizes == prepared.tokenizer.bytes_per_id()).all(), "exact, as for any text"


@KINDS
def test_a_text_whose_tail_is_held_out_counts_what_it_has(kind: str, tmp_path: Path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "one.txt").write_text(CYRILLIC * 100)
    prepared = prepared_by(TOKENIZERS[kind], tmp_path, given(tmp_path, model__vocab_size=400))
    everything = np.concatenate([prepared.train[0].all(), prepared.validation[0].all()])
    assert prepared.bytes_per_id()[everything].sum() == pytest.approx(len(CYRILLIC.encode()) * 100)


def test_a_stream_counts_them_too(tmp_path: Path):
    write(tmp_path / "source", 12, "Документ")
    prepared = prepared_by(TOKENIZERS["dropped"], tmp_path, config(tmp_path))
    assert "of the bytes of a sample of the text is lost" in prepared.describe_tokenizer()
    assert prepared.bytes_per_id()[prepared.validation[0].all()].mean() > 1.3, "a letter of two bytes is not there"


@KINDS
def test_the_tokenizer_line_and_a_warning_say_what_is_lost(kind: str, root: Path, capsys: pytest.CaptureFixture[str]):
    prepared = prepared_by(TOKENIZERS[kind], root, given(root, model__vocab_size=400))
    said = capsys.readouterr().out
    if kind == "lossless":
        assert prepared.describe_tokenizer().endswith("; nothing of a sample of the text is lost")
        assert "WARNING" not in said
    else:
        texts = [path.read_text() for path in (root / "source").iterdir()]
        back = [TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text)) for text in texts]
        gone = sum(round_trip.lost_bytes(*pair) for pair in zip(texts, back, strict=True))
        share = f"{gone / sum(len(text.encode()) for text in texts):.2%} of the bytes of a sample"
        assert prepared.describe_tokenizer().endswith(f"; {share} of the text is lost")
        assert f"given cannot spell the text: {share} do not come back" in said
    assert prepare_run_data(given(root, model__vocab_size=400)).describe_tokenizer() == prepared.describe_tokenizer()
    assert "WARNING" not in capsys.readouterr().out, "once"


def prepared_with(spelling: dict[str, int] | None) -> PreparedData:
    """One source, of which so much is known of how its texts come back."""
    side: dict[str, Any] = {"tokens": 1, "documents": 1, "files": {}, "dtype": "uint16", "first": 0}
    side |= {} if spelling is None else {"spelling": spelling}
    source = IndexSource.model_validate({"bad_records": 0, "held_out": "documents", "train": side, "validation": side})
    fingerprint = IndexFingerprint(sources={}, tokenizer={}, separator="", pad=None)
    index = DataIndex.model_construct(sources={"a": source}, fingerprint=fingerprint)
    return PreparedData(LOSSLESS, "x", "cached", "", np.dtype(np.uint16), (), (), (), 1, index)


def test_the_share_from_which_on_there_is_a_warning():
    for lost, warns in ((1, True), (0, False)):
        counted = asdict(RoundTripCounts(sampled=1000, lost=lost))
        assert bool(prepared_with(counted).warnings(400)) is warns
    rare = asdict(RoundTripCounts(sampled=10**6, lost=1))
    assert "; less than 0.01% of the bytes of a sample of the text is lost" in prepared_with(rare).describe_tokenizer()
    for damaged in ("x", [], {"lost": 1}, counted | {"lost": "1"}, counted | {"lost": None}):
        with pytest.raises(ValidationError):
            prepared_with(damaged)  # pyright: ignore[reportArgumentType]
    before = prepared_with(None)
    assert before.describe_tokenizer().endswith(" = 0"), "prepared before this was counted"
    assert before.bytes_per_id().tolist() == LOSSLESS.bytes_per_id().tolist()


def test_what_does_not_come_back():
    assert round_trip.lost_bytes("abc", "cba") == 0
    assert round_trip.lost_bytes("a日a", "a") == 4
    assert round_trip.lost_bytes("Ab", "ab") == 1
    assert round_trip.lost_bytes("é", "\ufffd\ufffd") == 2


def test_only_the_first_of_many_texts_are_decoded_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(round_trip, "DECODED_CHARACTERS", 10)
    speller = RoundTripCounter(LOSSLESS)
    for piece in encode_documents(enumerate(["Жabcde"] * 5), LOSSLESS, np.uint16):
        speller.add(piece)
    assert speller.found == RoundTripCounts(tokens=5 * len(LOSSLESS.encode("Жabcde")), unspelled=0, sampled=14, lost=0)


def test_a_bpe_that_finds_fewer_ids_than_asked_says_so(root: Path, capsys: pytest.CaptureFixture[str]):
    made = given(root, model__vocab_size=4096)
    made = made.model_copy(update={"tokenizer": made.tokenizer.model_copy(update={"name": "bpe", "vocab_size": 4000})})
    prepared = prepare_run_data(made)
    num_ids = prepared.tokenizer.num_ids
    assert prepared.describe_tokenizer().startswith(f"bpe: {num_ids} ids (4,000 were asked for), separator")
    said = capsys.readouterr().out
    assert f"WARNING: the text gave a tokenizer of {num_ids} ids, 4,000 were asked for: " in said
    assert f"{4096 - num_ids:,} of the 4,096 rows of the model's table will never be used" in said
    exact = made.model_copy(update={"tokenizer": made.tokenizer.model_copy(update={"vocab_size": 260})})
    exact = exact.model_copy(update={"run": exact.run.model_copy(update={"name": "exact"})})
    assert prepare_run_data(exact).describe_tokenizer().startswith("bpe: 260 ids, separator")
