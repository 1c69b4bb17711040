"""Three ranks and eight rows a step, on both ways of reducing gradients: two train, the third waits for them."""

import os
import signal
from pathlib import Path

import pytest

from smoltrain.errors import DONE, STOPPED
from tests import launches, tiny
from tests.zygote import Life, zygote

pytestmark = pytest.mark.slow
ROWS = ("batch.accumulation=null", "batch.rows_per_step=8", "checkpoint.every=4", "phases.continuation.steps=1")


def train(folder: Path, size: int, *words: str) -> Life:
    folder.mkdir(exist_ok=True)
    return zygote().train(tiny.words(folder, *ROWS, *words), size, folder / "log")


def run_of(folder: Path) -> Path:
    return folder / "runs" / "quickstart"


@pytest.mark.parametrize("way", ["step", "micro_batch"])
def test_a_rank_without_rows_waits_and_the_others_train_bit_for_bit_as_two(tmp_path: Path, way: str) -> None:
    asked = tmp_path / "three"
    three = train(asked, 3, f"engine.reduce_gradients={way}")
    assert three.end() == [DONE, DONE, DONE], three.text()
    said = "WARNING: 8 rows per step do not divide evenly among 3 ranks: 2 train, 1 is idle"
    assert three.text().count(said) == 1
    two = train(tmp_path / "two", 2, f"engine.reduce_gradients={way}")
    assert two.end() == [DONE, DONE], two.text()
    assert "idle" not in two.text()
    step = max(launches.losses(run_of(asked)))
    assert launches.losses(run_of(asked)) == launches.losses(run_of(tmp_path / "two"))
    assert launches.weights_digest(run_of(asked), step) == launches.weights_digest(run_of(tmp_path / "two"), step)


def test_a_signal_to_all_stops_all_and_other_worlds_go_on(tmp_path: Path) -> None:
    life = train(tmp_path, 3, "phases.main.steps=2000", "evaluate.every=5000", "sample.every=5000")
    launches.wait_until(lambda: "checkpoint step 4: " in life.text())
    for pid in life._pids:
        os.kill(pid, signal.SIGTERM)
    assert life.end() == [STOPPED] * 3, life.text()
    stopped = max(launches.losses(run_of(tmp_path)))
    alone = train(tmp_path, 1, "phases.main.steps=2000", "evaluate.every=5000", "sample.every=5000")
    launches.wait_until(lambda: f"restored step {stopped} on 1 ranks" in alone.text())
    alone.kill()


def test_an_idle_rank_leaves_after_a_signal_of_its_own_and_nobody_else_does(tmp_path: Path) -> None:
    life = train(tmp_path, 3, "phases.main.steps=2000", "evaluate.every=5000", "sample.every=5000")
    launches.wait_until(lambda: "checkpoint step 4: " in life.text())
    os.kill(life._pids[2], signal.SIGTERM)
    states = life.wait(lambda states: isinstance(states[2], int))
    assert states == ["runs", "runs", STOPPED], life.text()
    published = life.text().count("checkpoint step ")
    launches.wait_until(lambda: life.text().count("checkpoint step ") > published)
    life.kill()
