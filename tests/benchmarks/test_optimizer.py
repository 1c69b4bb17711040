"""The optimizer benchmark counts every weight once, and adds up what it has measured."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import optimizer
from benchmarks.optimizer import ADAMW, APPLY, MOMENTUM, NEWTON_SCHULZ, STEP, TORCHS, UpdatedWeights
from benchmarks.timing import CallTimes
from smoltrain.cli import run_app
from smoltrain.config.load import load_config
from smoltrain.kernels.newton_schulz import choose_dtype, newton_schulz_flops
from smoltrain.model.build import build_model, count_parameters

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("recipe", "matrices", "num_hidden"), [("smollm2-135m", 210, 106_168_320), ("quickstart", 14, 1_474_560)]
)
def test_every_weight_is_counted_once(recipe: str, matrices: int, num_hidden: int) -> None:
    section = load_config(recipe, []).model
    model = build_model(section, device="meta")
    weights = optimizer.find_updated_weights(model)
    assert sum(weights.matrices.values()) == matrices
    assert weights.num_hidden == num_hidden
    assert weights.num_hidden + weights.num_rest == count_parameters(model)


def test_an_update_is_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "MEASURED_WEIGHTS", 100)
    weights = UpdatedWeights({(10, 20): 3, (4, 5): 10}, num_rest=200)
    timed = {
        STEP: CallTimes(9.0, "3 of 3", 3),
        MOMENTUM: CallTimes(1.0, "3 of 3", 3),
        APPLY: CallTimes(2.0, "3 of 3", 3),
        ADAMW: CallTimes(5.0, "2 of 3, so all count", 3),
        f"{NEWTON_SCHULZ} (10, 20)": CallTimes(0.5, "3 of 3", 3),
        f"{NEWTON_SCHULZ} (4, 5)": CallTimes(0.25, "1 of 3, so all count", 3),
        f"{TORCHS} (10, 20)": CallTimes(0.75, "3 of 3", 3),
        f"{TORCHS} (4, 5)": CallTimes(0.5, "3 of 3", 3),
    }
    updates = optimizer.add_up_parts(timed, weights, steps=5, device=CPU)
    assert optimizer.sum_seconds(updates["adamw"]) == 10 * 5.0, "1,000 weights"
    muon = {part: cost.seconds for part, cost in updates["muon"].items()}
    assert muon == {MOMENTUM: 8.0, APPLY: 16.0, ADAMW: 10.0, NEWTON_SCHULZ: 3 * 0.5 + 10 * 0.25}
    assert updates["muon, torch's"][TORCHS].seconds == 3 * 0.75 + 10 * 0.5
    assert updates["muon"][NEWTON_SCHULZ].clean == "1/3", "of the shape with the fewest"
    dtype, _ = choose_dtype(CPU)
    want = 3 * newton_schulz_flops(10, 20, 5, dtype) + 10 * newton_schulz_flops(4, 5, 5, dtype)
    assert updates["muon"][NEWTON_SCHULZ].flops == want


@pytest.mark.parametrize("words", ["4096,", "many", "0", "-1", "4e3"])
def test_tokens_that_are_no_number(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_app(optimizer.app, ["quickstart", "--tokens", words])
    assert left.value.code == 2
    assert "--tokens" in capsys.readouterr().err


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(optimizer.compile, "missing_for_compile", lambda device: "compiling takes too long for a test")
    monkeypatch.setattr(optimizer, "MEASURED_WEIGHTS", 1000)
    monkeypatch.setattr(optimizer, "MEASURED_TOKENS", 32)
    words = ["batch.sequence_length=16", "engine.device=cpu", "optimizer.newton_schulz_steps=2"]
    with pytest.raises(SystemExit) as left:
        run_app(
            optimizer.app,
            ["quickstart", *words, "--tokens", "64,1024", "--rounds", "1", "--out", str(tmp_path / "bench.json")],
        )
    assert not left.value.code
    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["settings"]["measured_tokens"] == 32
    assert told["settings"]["newton_schulz_steps"] == 2
    assert math.isclose(told["step_s"]["1024"], 16 * told["step_s"]["64"])
    for tokens, shares in told["shares"].items():
        for name, share in shares.items():
            update_s = sum(part["seconds"] for part in told["measured"][name].values())
            assert math.isclose(share, update_s / (update_s + told["step_s"][tokens]))
    assert told["shares"]["1024"]["muon"] < told["shares"]["64"]["muon"] < 1
    shown = capsys.readouterr().out
    assert "14 hidden matrices of 1.5M weights" in shown
    assert "2 iterations in" in shown
    assert "not compiled" in shown
