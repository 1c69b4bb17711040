"""The picture of a plan."""

import json
import struct
from pathlib import Path

import pytest

from smoltrain.plan import Plan
from smoltrain.plots import plan_png, training_png
from smoltrain.schema import PhaseSection

MAIN = PhaseSection(name="main", steps=40, lr=3e-4, schedule="wsd", warmup_steps=5, decay_steps=10)
AFTER = PhaseSection(name="after", steps=3, schedule="continue", weight_decay=0.0)
ONE_STEP = PhaseSection(name="one", steps=1, lr=1e-3, weight_decay=0.0)


@pytest.mark.parametrize("phases", [(MAIN, AFTER), (ONE_STEP,), (MAIN, AFTER, ONE_STEP)])
def test_a_plan_becomes_a_png(tmp_path: Path, phases: tuple[PhaseSection, ...]):
    path = tmp_path / "plots" / "plan.png"
    plan_png(Plan(phases), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (1260, 672)


def test_the_same_plan_is_the_same_picture(tmp_path: Path):
    first, second, other = (tmp_path / name for name in ("first.png", "second.png", "other.png"))
    plan_png(Plan((MAIN, AFTER)), first)
    plan_png(Plan((MAIN, AFTER)), second)
    plan_png(Plan((MAIN, ONE_STEP)), other)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_a_run_becomes_a_png_of_its_curves(tmp_path: Path):
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "plots" / "training.png"
    lines = [{"step": n, "train/loss_nats_per_token": 9 / n, "train/lr": 1e-3} for n in range(1, 44)]
    lines.append({"step": 43, "validation/loss_nats_per_token": 0.5})
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    training_png(Plan((MAIN, AFTER)), metrics, path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    metrics.write_text(metrics.read_text().replace('"validation/loss_nats_per_token": 0.5', '"train/lr": 2e-3'))
    training_png(Plan((MAIN, AFTER)), metrics, path)
    assert path.read_bytes() != first
