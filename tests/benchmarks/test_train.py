"""Trainers side by side."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import timing, train, watching
from benchmarks.peak import Peaks
from benchmarks.train import TrainerResult, make_comparison_table, summarise_trainer_runs
from smoltrain.cli import run_app
from smoltrain.model.flops import flops_per_token
from tests import tiny


def test_mfu_of_a_published_model():
    """llm-foundry's MPT-125M: 142,830 tokens/s on each A100 (312 TFLOP/s) are 44.8 % at T 2048."""
    mpt = flops_per_token(parameters=125_311_488, layers=12, width=768, sequence_length=2048)
    tokens = 2048 * 512
    runs = [watching.TrainerRecord(30.0, [30.0, 20.0, 9.0, *[tokens / 142_830] * 5], [0.0] * 8, [9.0] * 7 + [4.0])]
    row = summarise_trainer_runs(runs, tokens, mpt, 312e12)
    assert (row.tokens_per_s, row.steps.clean) == (pytest.approx(142_830), "5 of 5")
    assert row.mfu == pytest.approx(0.448, abs=0.001)
    assert row.loss == (9.0, 4.0)


def test_a_row_takes_the_clean_steps_of_all_rounds_without_warm_up():
    first = watching.TrainerRecord(
        40.0, [40.0, 8.0, 8.0, 1.0, 7.0, 1.2], [None, 0.0, 0.0, 0.0, 3.0, 0.0], [5.0, *[4.0] * 5], 2
    )
    second = watching.TrainerRecord(
        20.0, [20.0, 8.0, 8.0, 1.4, 7.0, 6.0], [None, 0.0, 0.0, 0.0, 3.0, 3.0], [7.0, *[2.0] * 5], 3
    )
    row = summarise_trainer_runs([first, second], 120, 1e9, 1e12)
    assert row.steps == timing.CallTimes(1.2, "3 of 6", 6)
    assert (row.tokens_per_s, row.mfu) == (pytest.approx(100), pytest.approx(0.1))
    assert (row.peak_gib, row.start_s, row.loss) == (3, 20.0, (6.0, 3.0))


def test_the_table_tells_ratios_to_the_first_peer_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]):
    def row(rate: float) -> TrainerResult:
        steps = timing.CallTimes(600 / rate, "1 of 5, so all count", 5)
        return TrainerResult(steps, rate, rate / 1000, 2.0, 9.0, (10.8, 7.5), 7)

    rows = {"smoltrain": row(600), "hf-trainer+ds": row(300), "plain": row(150)}
    for first, ratios in {
        "hf-trainer+ds": ("2.00", "1.00", "0.50"),
        "litgpt": ("", "", ""),
        None: ("", "", ""),
    }.items():
        Console(width=80).print(make_comparison_table(rows, first, "cpu"))
        told = capsys.readouterr().out.splitlines()[-3:]
        for (name, found), ratio, line in zip(rows.items(), ratios, told, strict=True):
            rate, share = f"{found.tokens_per_s:.0f}", f"{found.mfu:.1%}"
            words = [name, f"{600 / found.tokens_per_s:.3f}", rate, ratio, share, "2.00", "9.0", "10.800", "7.500"]
            assert line.split() == [*filter(None, words), "1/5"]


def test_mfu_is_told_of_the_data_sheet_too():
    steps = timing.CallTimes(1.0, "5 of 5", 5)
    results = {"smoltrain": TrainerResult(steps, 1.0, 0.5, 2.0, 9.0, (10.8, 7.5), 7)}
    peaks = Peaks(700e12, 4e12, 989e12, "the data sheet of NVIDIA H200")
    told = train.describe_data_sheet_mfu(results, peaks, 800e12)  # the best of several rounds
    assert told == "MFU of the 989 TFLOP/s of the data sheet of NVIDIA H200: smoltrain 40.4%"
    unknown = peaks._replace(data_sheet_flops=None, data_sheet="no data sheet of X is known here")
    told = train.describe_data_sheet_mfu(results, unknown, 800e12)
    assert told == "MFU is of the measured peak alone: no data sheet of X is known here"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "hf-trainers"], "no such peer: saw 'hf-trainers', want 'hf-trainer'"),
        (["--steps", "5"], "too few steps to measure: saw 5, want 6 or more"),
    ],
)
def test_bench_train_refuses_what_it_cannot_measure(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        run_app(train.app, ["quickstart", *words])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_bench_train_measures_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [*tiny.words(tmp_path), "--steps", "7", "--rounds", "2", "--out", str(tmp_path / "bench.json")]
    with pytest.raises(SystemExit) as left:
        run_app(train.app, ["quickstart", *words])
    assert not left.value.code
    told = json.loads((tmp_path / "bench.json").read_text())
    ours, runs = told["measured"]["smoltrain"], told["runs"]["smoltrain"]
    assert len(runs) == len(told["matmul_flops"]) == 2
    for run in runs:
        assert len(run["losses"]) == len(run["step_s"]) == 7
        assert run["losses"] == runs[0]["losses"], "the same rows, the same weights"
        assert run["losses"][0] == pytest.approx(np.log(320), abs=0.2)
        assert run["losses"][-1] < run["losses"][0]
        assert 0.1 < run["peak_gib"] < 4
        assert any("attention kernel" in line for line in run["said"]), "what it chose"
    assert ours["steps"]["rounds"] == 8, "2 x (7 - 3 of warm-up)"
    assert ours["tokens_per_s"] == pytest.approx(4 * 16 / ours["steps"]["median_s"])
    assert 0 < ours["mfu"] < 1
    assert told["settings"]["rows_per_step"] == 4
    assert "smoltrain" in capsys.readouterr().out
