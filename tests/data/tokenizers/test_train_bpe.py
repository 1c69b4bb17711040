"""The training of the run's own tokenizer: what it says meanwhile."""

import random
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from smoltrain.data import progress
from smoltrain.data.documents import retry
from smoltrain.data.tokenizers import train_bpe as train_bpe_module
from smoltrain.data.tokenizers.tokenizer import SEAM_SEARCH_CHARACTERS, Tokenizer
from smoltrain.data.tokenizers.train_bpe import BpeProgress, DistinctWordCounter
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
    made.read = 1000
    assert made.state() == ("1,000 characters to train the tokenizer on", 0.5)
    made.merging_since = time.monotonic() - 61
    assert made.state()[0] == "1,000 characters to train the tokenizer on, merged for 61 s"
    made.read = 3000  # of files that were compressed
    assert made.state()[1] == 1.0


def test_a_separator_that_cannot_be_is_known_before_anything_is_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retry, "read_records_with_retry", None)
    assert "a sign that texts are made of: saw '|', want two characters or more" in problem(
        make(root, tokenizer__separator="|")
    )


# ---- memory


def test_words_that_differ_are_counted_once():
    english, chinese, mixed = DistinctWordCounter(), DistinctWordCounter(), random.Random(1)
    common = ["".join(mixed.choices("abcdefgh", k=6)) for _ in range(20_000)]
    for _ in range(3):
        english.add(" ".join(common))
    assert english.num_bytes == pytest.approx(6 * len(set(common)), rel=0.15)
    for _ in range(3):
        chinese.add("".join(chr(0x4E00 + mixed.randrange(3000)) for _ in range(100_000)))
    assert chinese.num_bytes == pytest.approx(900_000, rel=0.15), "no two stretches are equal"
    same = DistinctWordCounter()
    same.add("=" * 100_000 + "\0" * 100_000 + " " * 100_000)
    assert same.num_bytes <= 3 * 64 * train_bpe_module.WORD_SAMPLING


def test_a_text_of_ever_new_words_is_left_off(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(train_bpe_module, "MAX_DISTINCT_BYTES", 200_000)
    seen: list[str] = []
    train_bpe = Tokenizer.train_bpe
    monkeypatch.setattr(
        Tokenizer, "train_bpe", lambda texts, *rest: train_bpe([seen.append(text) or text for text in texts], *rest)
    )
    letters = random.Random(2)
    novel = "".join(chr(0x4E00 + letters.randrange(3000)) for _ in range(300_000))
    (root / "source" / "novel.txt").write_text(novel)
    prepare_run_data(make(root))
    num_characters = sum(map(len, seen))
    assert (
        66_000
        <= num_characters
        < 66_000 + 20 * 300 + 2 * (train_bpe_module.WORD_SCAN_CHARACTERS + SEAM_SEARCH_CHARACTERS)
    )
    line = f"data: the tokenizer is trained on the first {num_characters:,} characters of data; more have ever more"
    assert line in capsys.readouterr().out
