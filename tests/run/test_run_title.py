"""The title of a run's pictures."""

from pathlib import Path

from smoltrain.run.run_metrics import RunMetrics
from smoltrain.run.run_title import describe_run_title
from tests import tiny


def test_a_title_has_name_size_and_the_last_loss_on_held_out_rows(tmp_path: Path):
    config = tiny.load(tmp_path, "run.name=first")
    tiny.enter_run_folder(config, 1, 0)
    metrics = RunMetrics()
    metrics.add({"step": 7, "train/loss_nats_per_token": 5.123456})
    assert describe_run_title(config.run_folder, metrics) == "first, 28.8k parameters, training loss 5.123 at step 7"
    metrics.add({"step": 4, "validation/loss_nats_per_token": 5.5})
    assert describe_run_title(config.run_folder, metrics).endswith(" parameters, validation loss 5.5 at step 4")


def test_without_a_config_nobody_counts_parameters(tmp_path: Path):
    metrics = RunMetrics()
    metrics.add({"step": 1, "train/loss_nats_per_token": float("nan")})
    assert describe_run_title(tmp_path, metrics) == f"{tmp_path.name}, training loss nan at step 1"
