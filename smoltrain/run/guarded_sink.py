"""The guard of TensorBoard and its like, which must not cost a run.

A backend is called in a thread that is left behind when it takes too long, and never again after the first error, which
is said once. metrics.jsonl has every step; the next start gives a backend from it what it lacks.
"""

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.load import redacted_config
from smoltrain.config.schema import Config
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.errors import Problem, UserError
from smoltrain.files import METRICS_FILE, exception_title
from smoltrain.run.mlflow_backend import SERVER_VARIABLE, MlflowBackend
from smoltrain.run.run_folder import RunFolder
from smoltrain.run.sink import Backend, BackendStart, PublishedModel, drop_texts, read_steps_between
from smoltrain.run.tensorboard_backend import TensorBoardBackend
from smoltrain.timeout import call_with_timeout

SINKS_FILE = "sinks.json"  # by sink, the last step that it was given for certain
OPEN_TIMEOUT_S = 60.0  # to import its package and open its files
CALL_TIMEOUT_S = 15.0
FILL_TIMEOUT_S = 120.0  # for the steps that it lacks

OpenBackend = Callable[[BackendStart], Backend]
# By the name of the sink, which is that of the package, and of the extra that installs it.
BACKENDS: dict[str, OpenBackend] = {"tensorboard": TensorBoardBackend, "mlflow": MlflowBackend}


def check_sinks(config: Config) -> None:
    """Errors: UserError for a sink whose package is not installed, or that does not know its server."""
    for name in config.track.to:
        if name in BACKENDS and importlib.util.find_spec(name) is None:
            want = f'`pip install -e ".[{name}]"` in a checkout, or `pip install "WHEEL[{name}]"` of a wheel'
            raise UserError(Problem(f"{name} is not installed", f"track.to has {name}", want, "track.to"))
    if "mlflow" in config.track.to and not os.environ.get(SERVER_VARIABLE):
        want = "the URL of a server, as of `mlflow server`"
        raise UserError(Problem("mlflow has no server", f"no {SERVER_VARIABLE}", want, SERVER_VARIABLE))


def open_guarded_sinks(
    config: Config, folder: RunFolder, first_step: int, say: Callable[[str], None], derived: Mapping[str, Any]
) -> list["GuardedSink"]:
    """All that track.to asks for but W&B, for a start that goes on after `first_step`."""
    facts = redacted_config(config) | {"derived": dict(derived)}
    sinks: list[GuardedSink] = []
    for name in dict.fromkeys(config.track.to):
        if name in BACKENDS:
            last_step = min(first_step, read_last_steps(folder.path).get(name, 0))
            start = BackendStart(config, folder, facts, last_step)
            sinks.append(GuardedSink(name, BACKENDS[name], start, first_step, say))
    return sinks


def read_last_steps(folder: Path) -> dict[str, int]:
    """What SINKS_FILE says; {} where there is none that can be read: then a sink is given everything anew."""
    try:
        return {str(name): int(step) for name, step in json.loads((folder / SINKS_FILE).read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class GuardedSink:
    """A Sink of a backend; after the first error every call does nothing."""

    def __init__(
        self, name: str, open_backend: OpenBackend, start: BackendStart, first_step: int, say: Callable[[str], None]
    ) -> None:
        self._name = name
        self._folder = start.folder.path
        self._say = say
        self._first_step = first_step
        self._kept_step = self._step = start.last_step  # the last that it needs not, and that it was given
        self._backend: Backend | None = None
        try:
            self._backend = call_with_timeout(lambda: open_backend(start), OPEN_TIMEOUT_S)
        except Exception as error:
            description = f"off, it cannot be opened ({exception_title(error)})"
        else:
            description = self._backend.description
            self._kept_step = self._step = self._backend.kept_step
        if self._backend and self._kept_step < first_step:
            self._fill(first_step)
            description += f"; steps {self._kept_step + 1} to {first_step} come from {METRICS_FILE}"
        self.choices = [(name, description)]

    def _fill(self, last: int) -> None:
        """Give it the numbers that it lacks, up to this step."""

        def fill(backend: Backend) -> None:
            for step, numbers, time_s in read_steps_between(self._folder / METRICS_FILE, self._kept_step, last):
                backend.log(step, numbers, time_s)

        self._call(last, fill, FILL_TIMEOUT_S)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """See Sink; texts among them stay in metrics.jsonl."""
        self._call(step, lambda backend: backend.log(step, drop_texts(metrics), None))

    def log_histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """See Sink."""
        self._call(step, lambda backend: backend.log_histograms(step, layers))

    def log_samples(self, step: int, rows: list[list[Any]]) -> None:
        """See Sink."""
        samples = [(prompt, text) for row_step, prompt, text in rows if row_step == step]
        self._call(step, lambda backend: backend.log_samples(step, samples))

    def log_model(self, model: PublishedModel) -> None:
        """See Sink."""
        self._call(model.step, lambda backend: backend.flush())
        self._save_step()

    def write_log(self, text: str) -> None:
        """The log is in the run's folder already."""

    def finish(self, exit_code: int) -> None:
        """See Sink."""
        self._call(self._step, lambda backend: backend.close(exit_code), OPEN_TIMEOUT_S)
        self._save_step()
        self._backend = None

    def _call(self, step: int, call: Callable[[Backend], None], seconds: float | None = None) -> None:
        """The only place where a backend is called; the first error is the last call."""
        backend = self._backend
        if backend is None or self._first_step < step <= self._kept_step:  # the latter is done again, after a kill
            return
        try:
            call_with_timeout(lambda: call(backend), seconds or CALL_TIMEOUT_S)
        except Exception as error:
            self._backend = None
            rest = f"the next start gives it what it lacks, from {METRICS_FILE}"
            self._say(
                f"WARNING: {self._name} is dropped at step {step} ({exception_title(error)}); training goes on, {rest}"
            )
        else:
            self._step = max(step, self._step)

    def _save_step(self) -> None:
        """Write down how far it has got, if it still takes what it is given."""
        if self._backend:
            with contextlib.suppress(OSError):  # a full disk is said by what matters more
                steps = read_last_steps(self._folder) | {self._name: self._step}
                files.write_json_file(self._folder / SINKS_FILE, steps)
