"""A run as MLflow has it: its own client, on files in place of a server."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import UserError
from smoltrain.run.guarded_sink import check_sinks
from smoltrain.run.mlflow_backend import choose_run_of_folder
from smoltrain.run.track import Tracker
from tests import tiny

pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import mlflow

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return mlflow.MlflowClient((tmp_path / "mlruns").as_uri())


def opened(folder: Path, first_step: int = 0) -> Tracker:
    settings = tiny.load(folder, "track.to=[mlflow]")
    settings.run_folder.mkdir(parents=True, exist_ok=True)
    return Tracker(settings, tiny.run_folder(settings.run_folder), 0, first_step, 12, derived={"parameters": 7})


def test_mlflow_has_one_run_with_each_step_once(tmp_path: Path, client: Any) -> None:
    check_sinks(tiny.load(tmp_path, "track.to=[mlflow]"))
    for first_step, last_step, code in ((0, 5, 1), (3, 8, 0)):  # the steps behind the checkpoint are done again
        tracker = opened(tmp_path, first_step)
        for step in range(first_step + 1, last_step + 1):
            tracker.log_metrics(step, {"train/lr": step / 10, "data/ledger": "text"})
        tracker.log_samples(last_step, [("a", "<b>")])
        tracker.close(code)
    experiment = client.get_experiment_by_name("smoltrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("quickstart", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/lr")
    assert [(metric.step, metric.value) for metric in history] == [(step, step / 10) for step in range(1, 9)]
    assert set(run.data.metrics) == {"train/lr"}
    files = tmp_path / "mlruns" / experiment.experiment_id / run.info.run_id / "artifacts"
    assert (files / "samples" / "step-00000008.txt").read_text(encoding="utf-8") == "a<b>"
    assert "  parameters: 7\n" in (files / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_copied_folder_has_a_run_of_its_own_and_a_moved_one_its_old(tmp_path: Path, client: Any) -> None:
    def train(name: str, first_step: int) -> None:
        settings = tiny.load(tmp_path, "track.to=[mlflow]", f"run.name={name}")
        tracker = Tracker(settings, tiny.run_folder(settings.run_folder), 0, first_step, 12)
        tracker.log_metrics(first_step + 1, {"train/lr": 0.5})
        tracker.close(0)

    runs = tmp_path / "runs"
    (runs / "first").mkdir(parents=True)
    train("first", 0)
    shutil.copytree(runs / "first", runs / "copy")
    train("copy", 1)
    train("first", 1)  # which goes on
    (runs / "copy").rename(runs / "moved")
    train("moved", 2)
    experiment = client.get_experiment_by_name("smoltrain")
    found = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    steps = {
        name: [one.step for one in client.get_metric_history(run_id, "train/lr")] for name, run_id in found.items()
    }
    assert steps == {"first": [1, 2], "copy": [1, 2, 3]}, "the copy is told its past"


def test_a_run_of_a_version_that_told_no_folder_is_the_one_of_its_id(tmp_path: Path) -> None:
    assert choose_run_of_folder({"older": None}, tmp_path) == "older"
    assert choose_run_of_folder({"older": None, "own": str(tmp_path)}, tmp_path) == "own"
    assert choose_run_of_folder({}, tmp_path) is None


def test_without_a_server_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="mlflow has no server"):
        check_sinks(tiny.load(tmp_path, "track.to=[mlflow]"))
