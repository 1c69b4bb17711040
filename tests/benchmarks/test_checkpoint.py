"""What a save costs, from a run's metrics and of real runs."""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint
from benchmarks.checkpoint import SaveCost, compute_save_cost
from smoltrain.cli import run_app
from tests import tiny


def test_the_cost_of_a_save_is_its_pause_and_the_slower_steps_behind_it():
    lines: list[dict] = [{"step": step, "speed/step_s": 1.0} for step in range(1, 101)]
    for save in (24, 48, 100):
        lines.append({"step": save, "speed/checkpoint_pause_s": 0.5})
        for step in range(save, min(save + 3, 100)):
            lines[step]["speed/step_s"] = 2.0
    lines[0]["speed/step_s"] = 30.0
    lines[70]["speed/step_s"] = 9.0
    found = compute_save_cost(lines)
    assert found == SaveCost(saves=2, step_s=1.0, pause_s=0.5, slowdown_s=3.0)
    assert found.share_of_run(200) == pytest.approx(3.5 / 203.5)


@pytest.mark.slow
def test_bench_checkpoint_measures_both_ways_of_saving(tmp_path: Path):
    words = [*tiny.words(tmp_path), "--saves", "2", "--out", str(tmp_path / "bench.json")]
    with pytest.raises(SystemExit) as left:
        run_app(checkpoint.app, ["quickstart", *words])
    assert not left.value.code
    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["hardware"]["cores"] >= 1
    for cost in told["measured"].values():
        assert (cost["saves"], cost["step_s"] > 0, cost["pause_s"] > 0) == (2, True, True)
        assert 0 < cost["share"] < 1
