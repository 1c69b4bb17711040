"""The training of the run's own tokenizer: which text it learns from, and what it says meanwhile."""

import random
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from smoltrain.data import progress
from smoltrain.data.documents import retry
from smoltrain.data.tokenizers import bpe_sample
from smoltrain.data.tokenizers import train_bpe as train_bpe_module
from smoltrain.data.tokenizers.bpe_sample import DistinctWordCounter
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokenizers.train_bpe import BpeProgress
from smoltrain.data.tokens import plan_preparation
from smoltrain.data.tokens.prepare import prepare_run_data
from tests.data.tokens.test_tokenise import make, problem, twenty


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 0)
    monkeypatch.setattr(progress, "POLL_INTERVAL_S", 0.001)
    return twenty(tmp_path)


def test_it_says_how_much_it_has_read(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    train_bpe = Tokenizer.train_bpe

    def slow(texts: Iterable[str], *rest: object) -> Tokenizer:
        texts = list(texts)
        time.sleep(0.1)
        return train_bpe(texts, *rest)  # pyright: ignore

    monkeypatch.setattr(Tokenizer, "train_bpe", slow)
    prepare_run_data(make(root))
    num_characters = sum(len(path.read_text()) for path in (root / "source").iterdir())
    line = f"data: {num_characters:,} characters to train the tokenizer on, merged for 0 s so far"
    assert line in capsys.readouterr().out.splitlines()


def test_the_library_lets_others_speak_while_it_merges(root: Path, capsys: pytest.CaptureFixture[str]):
    (root / "source" / "genome.txt").write_text("".join(random.Random(0).choices("ACGT", k=200_000)))
    prepare_run_data(make(root, tokenizer__vocab_size=512))
    assert capsys.readouterr().out.count("merged for") > 1


def test_progress_in_words():
    made = BpeProgress(2000)
    made.counted = 2000
    assert made.state() == ("2,000 characters to train the tokenizer on", 0.5)
    made.read = 1000
    made.merging_since = time.monotonic() - 61
    assert made.state()[0] == "1,000 characters to train the tokenizer on, merged for 61 s"
    made.read = 3000  # of files that were compressed
    assert made.state()[1] == 1.0


def test_a_separator_that_cannot_be_is_known_before_anything_is_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retry, "read_records_with_retry", None)
    assert "a sign that texts are made of: saw '|', want two characters or more" in problem(
        make(root, tokenizer__separator="|")
    )


# ---- which text

ALPHABETS = (0x61, 0x3B1, 0x430)  # the first letters of Latin, Greek, Cyrillic


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    """A file for each of three scripts, of the same number of bytes."""
    (tmp_path / "source").mkdir()
    letters = random.Random(2)
    for first in ALPHABETS:
        words = ["".join(chr(first + letters.randrange(12)) for _ in range(7)) for _ in range(6_000)]
        text = " ".join(words).encode()[:40_000].decode(errors="ignore")
        (tmp_path / "source" / f"{first:05}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that tokenizers are trained on."""
    texts: list[str] = []
    train_bpe = Tokenizer.train_bpe

    def recording(given: Iterable[str], *rest: object) -> Tokenizer:
        texts.extend(given)
        return train_bpe(texts, *rest)  # pyright: ignore

    monkeypatch.setattr(Tokenizer, "train_bpe", recording)
    return texts


def count_by_script(texts: list[str]) -> list[int]:
    """How many letters are Latin, Greek, Cyrillic."""
    text = "".join(texts)
    return [sum(first <= ord(letter) < first + 12 for letter in text) for first in ALPHABETS]


def test_a_small_corpus_is_learned_from_whole_in_the_order_of_its_names(languages: Path, learned: list[str]):
    prepared = prepare_run_data(make(languages))
    texts = [path.read_text() for path in sorted((languages / "source").iterdir())]
    assert learned == texts
    assert prepared.tokenizer.fingerprint() == Tokenizer.train_bpe(texts, 280, "<|endoftext|>").fingerprint()


def test_of_a_large_corpus_every_file_is_learned_from(
    languages: Path, learned: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(plan_preparation, "MAX_AUTO_CACHED_MIB", 0)
    monkeypatch.setattr(train_bpe_module, "CHARACTERS_TO_TRAIN_ON", 9_000)
    prepare_run_data(make(languages, data__mode="cached"))
    assert count_by_script(learned) == pytest.approx([3_000 * 7 / 8] * 3, rel=0.02), "the rest are spaces"
    line = "data: the tokenizer is trained on a sample of data: 9,000 characters out of 3 of its 3 files, by their size"
    assert line in capsys.readouterr().out.splitlines()


def test_sources_are_learned_from_by_their_weight_and_each_of_their_files_by_its_size(
    languages: Path, learned: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan_preparation, "MAX_AUTO_CACHED_MIB", 0)
    monkeypatch.setattr(train_bpe_module, "CHARACTERS_TO_TRAIN_ON", 8_000)
    source = languages / "source"
    latin, greek, cyrillic = sorted(source.iterdir())
    (source / "east").mkdir()
    greek.rename(source / "east" / greek.name)
    cyrillic.rename(source / "east" / cyrillic.name)
    parts = [
        {"name": "west", "path": str(latin), "weight": 1.0},
        {"name": "east", "path": str(source / "east"), "weight": 3.0},
    ]
    prepare_run_data(make(languages, data__mode="cached", data__path=None, data__sources=parts))
    assert count_by_script(learned) == pytest.approx([2_000 * 7 / 8, 3_000 * 7 / 8, 3_000 * 7 / 8], rel=0.02)


def test_where_words_differ_too_much_all_files_are_learned_from_still(
    languages: Path, learned: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(train_bpe_module, "MAX_DISTINCT_BYTES", 30_000)
    monkeypatch.setattr(bpe_sample, "PIECE_CHARACTERS", 500)
    prepare_run_data(make(languages))
    counts = count_by_script(learned)
    num_characters = sum(map(len, learned))
    num_all = sum(len(path.read_text()) for path in (languages / "source").iterdir())
    assert min(counts) > 0.1 * sum(counts)
    words = DistinctWordCounter()
    for text in learned:
        words.add(text)
    assert 20_000 < words.num_bytes <= 30_000
    saw = f"{num_characters:,} of {num_all:,} characters of data, spread evenly"
    assert f"data: the tokenizer is trained on {saw}; more have ever more" in capsys.readouterr().out
