"""A run for a server of MLflow, which MLFLOW_TRACKING_URI names. The only importer of mlflow.

MLflow keeps every number that it was ever given, so nothing can be cut off: what a kill lets come out a second time is
not given again. Numbers go there in batches, as each is a request that training waits for.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from smoltrain.config.yaml_text import dump_yaml
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.errors import DONE
from smoltrain.run.sink import BackendStart

SERVER_VARIABLE = "MLFLOW_TRACKING_URI"
RUN_TAG = "smoltrain.run"  # the id by which a run finds itself at its next start
FOLDER_TAG = "smoltrain.folder"  # where its folder lay at the newest one: a copy has the same id
LR = "train/lr"  # of every step: tells how far MLflow has been told
MAX_BATCH = 500  # numbers of a request; MLflow takes 1,000
BATCH_S = 10.0  # that a number waits at most, while there are steps


class MlflowBackend:
    """A Backend, see sink.py."""

    def __init__(self, start: BackendStart) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing goes anywhere but to the server
        from mlflow import MlflowClient

        server = os.environ[SERVER_VARIABLE]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "smoltrain")
        self._client: Any = MlflowClient(server)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        own_id = start.folder.wandb_id
        here = start.folder.path.resolve()
        runs = self._client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{own_id}'")
        found = choose_run_of_folder({run.info.run_id: run.data.tags.get(FOLDER_TAG) for run in runs}, here)
        if found:
            self._run_id = found
            self._client.update_run(self._run_id, status="RUNNING")
            self._client.set_tag(self._run_id, FOLDER_TAG, str(here))
            history = self._client.get_metric_history(self._run_id, LR)
            self.kept_step = max((metric.step for metric in history), default=0)
        else:
            tags = {RUN_TAG: own_id, FOLDER_TAG: str(here)}
            run = self._client.create_run(experiment_id, tags=tags, run_name=start.config.run.name)
            self._run_id = run.info.run_id
            self.kept_step = 0
        self._client.log_text(self._run_id, dump_yaml(start.facts), "config.yaml")
        self._waiting: list[Any] = []
        self._sent_at = time.monotonic()
        self.description = f"{server}, experiment {name}, run {self._run_id}"

    def log(self, step: int, numbers: Mapping[str, float], time_s: float | None) -> None:
        """See Backend."""
        from mlflow.entities import Metric

        # Between two steps, so that a kill leaves none in part.
        begins_step = bool(self._waiting) and step > self._waiting[-1].step
        if begins_step and (len(self._waiting) >= MAX_BATCH or time.monotonic() - self._sent_at > BATCH_S):
            self.flush()
        timestamp_ms = int(1000 * (time_s or time.time()))
        self._waiting += [Metric(name, value, timestamp_ms, step) for name, value in numbers.items()]

    def log_histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """MLflow has none."""

    def log_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """See Backend."""
        text = "\n\n----\n\n".join(prompt + text for prompt, text in samples)
        self._client.log_text(self._run_id, text, str(PurePosixPath("samples", f"step-{step:08d}.txt")))

    def flush(self) -> None:
        """See Backend."""
        while self._waiting:
            self._client.log_batch(self._run_id, metrics=self._waiting[:MAX_BATCH])
            self._waiting = self._waiting[MAX_BATCH:]
        self._sent_at = time.monotonic()

    def close(self, exit_code: int) -> None:
        """See Backend."""
        self.flush()
        status = "FINISHED" if exit_code == DONE else "FAILED"
        self._client.set_terminated(self._run_id, status)


def choose_run_of_folder(folders: Mapping[str, str | None], here: Path) -> str | None:
    """Which of some runs of MLflow is that of the folder `here`: its own, or that of one which has moved; else None.

    `folders` are those that the runs told, by run id; None of a version that told none. A folder that is still there is
    another one, of which `here` is a copy, or that is a copy itself.
    """
    moved: str | None = None
    for run_id, told in folders.items():
        if told == str(here):
            return run_id
        if told is None or not Path(told).is_dir() or Path(told).samefile(here):
            moved = moved or run_id
    return moved
