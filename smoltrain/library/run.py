"""`smoltrain.Run`: what a run has written, for a program to read, plot, load and export."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from smoltrain.checkpoint.manifest import list_checkpoint_steps
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.load import read_run_config, stop_after_phase
from smoltrain.config.schema import Config
from smoltrain.export.export import export_model
from smoltrain.files import METRICS_FILE, read_jsonl
from smoltrain.inference.find_run import find_run_folder
from smoltrain.library.model import Model, load
from smoltrain.run.plots import draw_run
from smoltrain.run.run_folder import SAMPLES_FILE
from smoltrain.schedule import Plan


class Sample(NamedTuple):
    """A text that the model wrote during training: after which step, behind which prompt."""

    step: int
    prompt: str
    text: str


class Run:
    """A run's folder: its config, metrics, samples and checkpoints. `smoltrain.train` returns one.

    Args:
        source: The run's folder, or the name of one under runs/.
        stop_reason: As `train` says it.

    Raises:
        UserError: If there is no such run.
    """

    def __init__(self, source: str | Path, *, stop_reason: str | None = None) -> None:
        self.folder: Path = find_run_folder(str(source))
        self.stop_reason: str | None = stop_reason  # of a `train` that returned before the end, as "SIGINT"

    def __repr__(self) -> str:
        stopped = f", stopped by {self.stop_reason}" if self.stop_reason else ""
        return f"<Run {str(self.folder)!r}: step {self.step} of {self._plan.last_step}{stopped}>"

    @functools.cached_property
    def config(self) -> Config:
        """The config of its newest start, for all phases of the plan: which one that start was in is not said of it."""
        return stop_after_phase(read_run_config(self.folder / CONFIG_FILE), None)

    @functools.cached_property
    def _plan(self) -> Plan:
        return Plan(self.config.phases)

    @property
    def step(self) -> int:
        """Of the newest checkpoint; 0 without one."""
        return max(list_checkpoint_steps(self.folder / "checkpoints"), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the last step of the plan is done and saved."""
        return self.step >= self._plan.last_step

    def metrics(self) -> dict[str, np.ndarray]:
        """Every metric of metrics.jsonl by name, one entry for each step in "step".

        All arrays are of one length, float64 with NaN where a step has no such number, as most have no validation loss;
        texts are in arrays of objects, with None. So `pandas.DataFrame(run.metrics())` is a table.
        """
        values_by_step: dict[int, dict[str, Any]] = {}
        for line in read_jsonl(self.folder / METRICS_FILE):
            values_by_step.setdefault(line["step"], {}).update(line)
        steps = sorted(values_by_step)
        names = dict.fromkeys(name for values in values_by_step.values() for name in values)
        columns = {"step": np.array(steps, np.int64)}
        for name in names:
            if name == "step":
                continue
            column = [values_by_step[step].get(name) for step in steps]
            columns[name] = np.array(column, object if any(isinstance(value, str) for value in column) else np.float64)
        return columns

    def samples(self) -> list[Sample]:
        """What the model wrote during training, in order."""
        return [Sample(line["step"], line["prompt"], line["text"]) for line in read_jsonl(self.folder / SAMPLES_FILE)]

    def plot(self) -> list[Path]:
        """Draw the curves as PNG files under plots/ of the folder, and return them: the loss, and every panel.

        Raises:
            UserError: If no step is trained yet.
        """
        return draw_run(self._plan, self.folder)

    def load(self, step: int | None = None, *, model: nn.Module | Callable[[], nn.Module] | None = None) -> Model:
        """The model of the newest checkpoint, or that of `step`; see `smoltrain.load`."""
        return load(self.folder, step, model=model)

    def export(self, out: str | Path | None = None, step: int | None = None) -> Path:
        """Write a Hugging Face folder, by default export/step-N of the run's, and compare it with transformers alone.

        Raises:
            UserError: For a checkpoint that is not there, an `out` that is something else, and a model of one's own.
            TrainingStopped: If transformers does not compute the same.
        """
        return export_model(str(self.folder), out, step)
