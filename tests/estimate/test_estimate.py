"""The verb: parts, alternatives, advice, and errors of one line."""

from pathlib import Path

import pytest
import torch

from smoltrain.cli import main
from smoltrain.estimate import estimate
from smoltrain.estimate.measure import MeasuredRun
from smoltrain.estimate.memory import PART_LABELS
from tests import tiny
from tests.estimate.setups import SMOL


def run(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        main(["estimate", *words])
    return left.value.code


def test_the_verb_tells_parts_alternatives_and_advice(capsys: pytest.CaptureFixture[str]):
    words = ("batch.sequence_length=2048", "batch.micro_batch=8", "engine.reduce_gradients=micro_batch")
    assert not run(SMOL, *words, "--world", "8", "--device", "h200")
    out = capsys.readouterr().out
    assert "134,515,008 parameters on 8 x h200, ZeRO-2, bf16" in out
    for word in (*PART_LABELS.values(), "q, k, v, o", "at its limits", "in all", "every 2.", "2*", "checkpoints of"):
        if word not in ("the update's temporaries", "a checkpoint in the making"):
            assert word in out, word
    assert "MFU of its data sheet's 989 TFLOP/s; at its limits" in " ".join(out.split())
    assert "ZeRO-2 is" in out
    assert "the fastest that fits" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--device", "h20"), "no such device: saw 'h20', want 'h200' (the nearest valid one)"),
        (("--device", "l4", "--measure"), "--measure runs on this machine: saw no CUDA device"),
        (
            ("--world", "3", "batch.rows_per_step=8", "batch.accumulation=null", "--device", "l4"),
            "do not divide evenly: saw 8 rows on 3 ranks x 4, want a number of ranks that divides the rows; change",
        ),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available() and "--measure" in words:
        pytest.skip("there is a CUDA device, so that it would run; the other cases refuse")
    assert run("quickstart", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]):
    assert not run(SMOL, "batch.sequence_length=8192", "batch.micro_batch=32", "--device", "l4")
    out = capsys.readouterr().out
    assert "does not fit l4 (22 GiB a rank)" in out
    assert not run(SMOL, "batch.micro_batch=16384", "batch.rows_per_step=16384", "--device", "l4")
    assert "nothing in the table fits: take a smaller batch.micro_batch" in capsys.readouterr().out


def test_what_was_measured_takes_the_place_of_what_was_estimated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[tuple] = []

    def measure(*arguments: object) -> MeasuredRun:
        asked.append(arguments)
        return MeasuredRun(step_s=123.0, peak_bytes=77 * 2**30)

    monkeypatch.setattr(estimate, "measure_run", measure)
    words = ["batch.micro_batch=auto", "batch.accumulation=null", "batch.rows_per_step=12", "checkpoint.every=0"]
    words += ["engine.precision=bf16", "optimizer.kind=adamw", "optimizer.momentum=0.95"]
    assert not run("quickstart", *words, "engine.gradient_checkpointing=auto", "--measure")
    (recipe, overrides, ranks), out = asked[0], capsys.readouterr().out
    assert (recipe, ranks) == ("quickstart", 1)
    assert overrides[: len(words)] == words
    assert {"engine.device=cpu", "batch.micro_batch=12", "engine.gradient_checkpointing=none"} < set(overrides)
    assert "engine.compile=off" in overrides, "as of the recipe's whole plan"
    assert "measured here, 1 x cpu: step 123.000 s, estimated " in out
    gib = next(line for line in out.splitlines() if line.startswith("in all")).split()[2]
    assert 77 <= float(gib) < 77.1, "and a checkpoint in the making"
    assert "123.000" in next(line for line in out.splitlines() if line.strip().startswith("2*"))


@pytest.mark.slow
def test_measure_trains_here_and_says_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert not run("quickstart", *tiny.words(tmp_path), "engine.device=cpu", "--device", "cpu", "--measure")
    out = capsys.readouterr().out
    assert "measured here, 1 x cpu: step " in out
    assert not (tmp_path / "runs").exists(), "the run's own folder is left alone"
