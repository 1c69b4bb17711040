"""Time to a validation loss."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import peers, time_to_loss
from benchmarks.loss_curves import Entry, measure_reached
from benchmarks.time_to_loss import describe_entry, find_reference_loss, make_table
from smoltrain.cli import run_app
from smoltrain.errors import TrainingStopped
from tests import tiny
from tests.benchmarks.test_loss_curves import record


def run(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        run_app(time_to_loss.app, list(words))
    return left.value.code


def test_the_table_tells_ratios_to_the_reference_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]):
    entries = [
        Entry("smoltrain muon, 120 steps", 120, {2e-3: record(5.0, 4.0, 3.0)}, []),
        Entry("hf-trainer", 160, {1e-3: record(5.0, 4.6, 4.5, 4.0, step_s=2.0), 2e-3: record(5.0, 4.9)}, []),
        Entry("plain+compile", 160, {2e-3: record(5.0, 4.9)}, []),
    ]
    reached = {entry.name: measure_reached(entry, 4.0, 131_072, interpolate=False) for entry in entries}
    Console(width=80).print(make_table(entries, reached, "hf-trainer"))
    *_, first, _, second, third = capsys.readouterr().out.splitlines()
    assert first.split() == [
        "smoltrain", "muon", "0.002", "3.000", "20", "0.50", "2,621,440", "20.0", "0.25", "79.0",
    ]  # fmt: skip
    assert second.split() == [
        "hf-trainer", "0.001", "4.000", "40", "1.00", "5,242,880", "80.0", "1.00", "148.0",
    ]  # fmt: skip
    assert third.split() == ["plain+compile", "0.002", "4.900", "never"]
    Console(width=80).print(make_table(entries, reached, "plain+compile"))
    assert "0.50" not in capsys.readouterr().out, "no ratio to who was never there"


def test_an_entry_tells_every_rate_and_an_edge():
    runs = {1e-3: record(5.0, 4.5), 2e-3: record(5.0, 4.0), 4e-3: record(5.0, 3.9)}
    entry = Entry("hf-trainer", 20, runs, [])
    told = (
        "hf-trainer: 4.500 at 0.001, 4.000 at 0.002, 3.900 at 0.004; the best rate, 0.004, is the highest that was "
        "tried; 1.000 s a step, clean 17 of 17"
    )
    assert describe_entry(entry, None) == told
    assert describe_entry(entry, measure_reached(entry, 4.0, 1, interpolate=False)) == f"{told}; raw sum 20.0 s"


def test_the_loss_to_reach_is_the_best_of_the_peers_best_run():
    runs = {1e-3: record(5.0, 3.0, 4.5), 2e-3: record(5.0, 4.1, 4.2), 4e-3: record(5.0, float("nan"))}
    assert find_reference_loss([Entry("plain", 30, runs, [])], "plain", {}) == 4.1
    with pytest.raises(TrainingStopped, match="plain, which sets the loss to reach, has none: no loss is finite"):
        find_reference_loss([Entry("plain", 30, {4e-3: record(float("nan"))}, [])], "plain", {})
    with pytest.raises(TrainingStopped, match="has none: it is not here"):
        find_reference_loss([], "plain", {("plain", 1e-3): "it is not here"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "hf"], "no such peer: saw 'hf'"),
        (["--ours", "sgd"], "no such optimizer: saw sgd"),
        (["--rates", "fast"], "these are no rates: saw fast"),
        (["--rates", "muon=1e-3"], "adamw has no rates to try"),
        (["--steps", "4", "--every", "2"], "too few steps to measure: saw 4, want 6 or more"),
        (["--steps", "25"], "no evaluation at the end of 25 steps: saw 10, want a divisor"),
        (["--our-steps", "170"], "ours would train on more rows: saw 170, want at most 160"),
        (["--our-steps", "few"], "these are no steps: saw few"),
        (["--against", ""], "there is no loss to reach: saw ''"),
        (["--until-best-of", "plain"], "there is no loss to reach: saw 'plain', want one of --against"),
        (["--micro-batch", "3"], "the peers' micro-batch does not divide 4 rows"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(time_to_loss, "run_sweep", None)
    assert run("quickstart", *tiny.words(tmp_path), "--results", str(tmp_path / "results"), *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_ours_and_a_plain_loop_train_the_same_rows_to_a_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "install_peer_environment", lambda _: Path(sys.prefix))
    monkeypatch.setattr(time_to_loss, "read_peer_versions", lambda _: {})
    words = [
        *tiny.words(tmp_path), "--against", "plain", "--ours", "adamw", "--steps", "12", "--every", "4", "--rates",
        "1e-3,5e-3", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "bench.json"),
    ]  # fmt: skip
    assert not run("quickstart", *words)
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "bench.json").read_text())
    ours, plain = told["measured"]["smoltrain adamw"], told["measured"]["plain"]
    assert told["loss"] == plain["final_loss"]
    assert (plain["best_rate"], plain["reached"]["steps"]) == (5e-3, 12)
    assert plain["reached"]["tokens"] == 12 * 4 * 16
    for rate in ("0.001", "0.005"):
        first, second = ours["runs"][rate], plain["runs"][rate]
        assert [found["step"] for found in first["evaluations"]] == [4, 8, 12]
        # Other weights to begin with, the same rows and rates: the curves lie side by side.
        assert first["losses"] == pytest.approx(second["losses"], abs=0.25)
        for one, other in zip(first["evaluations"], second["evaluations"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=0.15)
    assert "the best rate" in out or "only 2 rates" in out
    assert (tmp_path / "bench.png").is_file()
    assert not run("quickstart", *words, "--until-loss", "1.0", "--interpolate")
    again = capsys.readouterr().out
    assert again.count("kept from") == 4, "nothing is trained twice"
    assert again.count(" never ") == 2
