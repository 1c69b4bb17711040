"""What real steps tell."""

import sys
from pathlib import Path

import pytest

from smoltrain.config.load import load_config
from smoltrain.errors import TrainingStopped
from smoltrain.estimate.measure import RUN_NAME, measurement_overrides, run_for_metrics, summarize_run_metrics


def test_the_numbers_of_a_measured_run():
    lines = [{"step": i, "speed/step_s": 9.0 if i < 5 else 2.0, "memory/peak_gib": 1 + i / 10} for i in range(20)]
    measured = summarize_run_metrics([{"step": 0, "validation/loss_nats_per_token": 1.0}, *lines])
    assert (measured.step_s, measured.peak_bytes) == (2.0, pytest.approx(2.9 * 2**30))


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path: Path):
    command = [sys.executable, "-c", "print('first'); print('x' * 600); raise SystemExit(3)"]
    with pytest.raises(TrainingStopped) as stopped:
        run_for_metrics(command, tmp_path)
    assert str(stopped.value) == "the run that was to be measured ended with code 3: " + "x" * 499


def test_what_is_measured_is_one_phase_and_nothing_beside(tmp_path: Path):
    config = load_config("quickstart")
    measured = load_config("quickstart", measurement_overrides(config, 20, tmp_path))
    assert measured.run_folder == tmp_path / RUN_NAME
    assert (measured.run.stop_after, measured.phases[0].steps) == (config.phases[0].name, 20)
    assert (measured.evaluate.every, measured.sample.every, measured.checkpoint.every) == (0, 0, 0)
    assert (measured.track.gradients_every, measured.track.to) == (0, ())


@pytest.mark.parametrize("length", ["phases.main.tokens=1000000", "phases.main.epochs=2", "phases.main.steps=70"])
def test_another_length_of_the_phase_on_the_command_line_gives_way(tmp_path: Path, length: str):
    config = load_config("quickstart", [length])
    measured = load_config("quickstart", [length, *measurement_overrides(config, 20, tmp_path)])
    assert measured.phases[0].horizon == {"steps": 20}


@pytest.mark.parametrize("load", ["weights", "all"])
def test_what_is_measured_begins_with_fresh_weights(tmp_path: Path, load: str):
    """By its name a run is not found from the temporary folder, and one that is gone on with has done these steps."""
    words = ["init.from=another", f"init.load={load}"]
    config = load_config("quickstart", words)
    measured = load_config("quickstart", [*words, *measurement_overrides(config, 20, tmp_path)])
    assert (measured.init.source, measured.init.load) == (None, "weights")
