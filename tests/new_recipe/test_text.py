"""The vocabulary that a text can teach, and what is held out of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from smoltrain.config.schema import DataSection
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.new_recipe import sample as samples
from smoltrain.new_recipe import text as texts
from smoltrain.new_recipe.sample import TextSample, sample_text
from smoltrain.new_recipe.text import FittedVocabulary, choose_validation_share, fit_vocabulary, largest_by_zipf
from tests.new_recipe.texts import write_texts

SEPARATOR = "<|endoftext|>"


def sample(path: Path) -> TextSample:
    return sample_text(DataSection(path=str(path)))


# --- the vocabulary


@pytest.mark.parametrize("num_tokens", [1e3, 1e5, 2e6, 1e9, 1e12])
def test_a_rare_id_stands_a_hundred_times_in_the_text(num_tokens: float):
    size = largest_by_zipf(num_tokens)
    assert num_tokens / (size * math.log(size)) >= 99
    assert num_tokens / ((size + 1) * math.log(size + 1)) <= 100


def test_no_more_ids_than_the_text_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts, "SEEN_PER_ID", 0.001)
    found = sample(write_texts(tmp_path / "texts", 3, 5))
    fitted = fit_vocabulary(found, 49152, SEPARATOR)
    given = Tokenizer.train_bpe((document.text for document in found.documents), 49152, SEPARATOR).num_ids
    assert 257 < fitted.size <= given < 514
    assert fitted.size == given
    assert fitted.reason == "all that the text gives"


def test_the_smallest_of_the_limits_counts(tmp_path: Path):
    found = sample(write_texts(tmp_path / "texts"))
    by_text = fit_vocabulary(found, 49152, SEPARATOR)
    assert (by_text.size, by_text.reason) == (257, "the text"), "its 30,000 tokens can teach no merge"
    many = replace(found, total_bytes=1e12, is_whole=False)
    by_model = fit_vocabulary(many, 1000, SEPARATOR)
    assert (by_model.size, by_model.reason) == (960, "the model")
    assert by_model.text_tokens == pytest.approx(1e12 / by_model.bytes_per_token)
    texts_ids = Tokenizer.train_bpe((d.text for d in found.documents), 960, SEPARATOR)
    num_tokens = sum(len(texts_ids.encode(d.text)) + 1 for d in found.documents)
    assert by_model.bytes_per_token == pytest.approx(found.num_bytes / num_tokens)


# --- held out


def test_the_smallest_share_that_holds_out_enough(tmp_path: Path):
    found = sample(write_texts(tmp_path / "texts", 200, 3))
    vocabulary = FittedVocabulary(257, "the text", 1.0, float(found.num_bytes))
    for wanted in (0.01, 0.05, 0.15):
        share, tokens = choose_validation_share(found, vocabulary, wanted * found.num_bytes)
        assert tokens >= wanted * found.num_bytes
        smaller = [s for s in texts.SHARES if s < share]
        assert all(texts.count_held_out_tokens(found, vocabulary, s) < wanted * found.num_bytes for s in smaller)
    assert choose_validation_share(found, vocabulary, found.num_bytes)[0] == texts.SHARES[-1]


def test_what_is_held_out_is_what_a_run_holds_out(tmp_path: Path):
    found = sample(write_texts(tmp_path / "texts", 100, 3))
    vocabulary = FittedVocabulary(257, "the text", 2.0, found.num_bytes / 2)
    held_out = [document for document in found.documents if is_held_out(document.name, 0.1)]
    assert held_out
    expected = sum(len(document.text) for document in held_out) / 2
    assert texts.count_held_out_tokens(found, vocabulary, 0.1) == pytest.approx(expected)


def test_of_a_single_text_the_end_is_held_out(tmp_path: Path):
    (tmp_path / "one.txt").write_text("word " * 2000)
    found = sample(tmp_path)
    vocabulary = FittedVocabulary(257, "the text", 1.0, 10_000.0)
    assert choose_validation_share(found, vocabulary, 450) == (0.05, 500.0)


def test_of_large_files_those_are_held_out_that_a_run_holds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 3000)
    monkeypatch.setattr(samples, "SHARD_BYTES", 500)
    found = sample(write_texts(tmp_path / "texts", 20, 10))
    assert not found.is_whole
    vocabulary = FittedVocabulary(257, "the text", 1.0, 1000.0)
    files = sorted((tmp_path / "texts").iterdir())
    held_out = [path.stat().st_size for path in files if is_held_out(path.name, 0.1)]
    assert 0 < len(held_out) < 20
    expected = 1000 * sum(held_out) / sum(path.stat().st_size for path in files)
    assert texts.count_held_out_tokens(found, vocabulary, 0.1) == pytest.approx(expected)
    assert expected != pytest.approx(100, rel=0.1), "the share of the documents is not theirs of the text"


def test_a_share_that_holds_out_no_document_of_a_streamed_text_is_not_chosen(tmp_path: Path):
    """A run that streams refuses it; any other one holds out the end of the text."""
    cached = replace(sample(write_texts(tmp_path / "texts", 3, 3)), is_whole=False)
    vocabulary = FittedVocabulary(257, "the text", 1.0, 1000.0)
    names = [f"{number}.txt" for number in range(200)]
    files = tuple((name, 10) for name in names if not is_held_out(name, 0.01))
    streamed = replace(cached, is_streamed=True, num_files=200, document_bytes=files)
    num_held_out = sum(is_held_out(name, 0.02) for name, _ in files)
    assert num_held_out
    share, tokens = choose_validation_share(streamed, vocabulary, 1)
    assert (share, tokens) == (0.02, pytest.approx(1000 * num_held_out / len(files)))
    none = replace(streamed, document_bytes=(("0.txt", 10),))
    assert texts.count_held_out_tokens(none, vocabulary, 0.005) == 0
    assert texts.count_held_out_tokens(replace(none, is_streamed=False), vocabulary, 0.005) == 5
