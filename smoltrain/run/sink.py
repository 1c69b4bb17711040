"""What W&B, TensorBoard and MLflow are to a run: a Sink, which the tracker tells what it logs.

W&B is one by itself (wandb_run.py), as it has ids and a server to agree with. What writes for another program is a
small Backend, called by GuardedSink (guarded_sink.py).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smoltrain import files
from smoltrain.config.schema import Config
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.run.run_folder import RunFolder

HISTOGRAM_PREFIX = "gradients/histogram/"  # + layer: the entries of its gradient


class PublishedModel(NamedTuple):
    """The weights of a checkpoint that was published."""

    step: int
    weights: Path
    ends_phase: bool
    validation_loss: float | None  # at this step, nats per token; None if it was not evaluated


class Sink(Protocol):
    """What the tracker of rank 0 tells. No call raises, and none holds up training for long."""

    choices: list[tuple[str, str]]
    """(what, where and why), for the console."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Values of a step by name; it may be called several times for one step."""
        ...

    def log_histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """Each layer's gradient."""
        ...

    def log_samples(self, step: int, rows: list[list[Any]]) -> None:
        """[step, prompt, text] of all samples so far, those of this step last."""
        ...

    def log_model(self, model: PublishedModel) -> None:
        """A checkpoint was published: what was logged up to it will not be logged again after a kill."""
        ...

    def write_log(self, text: str) -> None:
        """What the console, or the log of rank 0, says."""
        ...

    def finish(self, exit_code: int) -> None:
        """Flush and close; how the process ends."""
        ...


class Backend(Protocol):
    """What writes for one program. Its calls may raise anything; GuardedSink answers for them."""

    description: str  # where it writes, for the console
    kept_step: int  # it has everything up to this step, and is given none of it again

    def log(self, step: int, numbers: Mapping[str, float], time_s: float | None) -> None:
        """`time_s`: seconds since 1970, None for now."""
        ...

    def log_histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """Each layer's gradient, where the program has histograms."""
        ...

    def log_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """(prompt, text) of the samples of this step."""
        ...

    def flush(self) -> None:
        """What was logged before is on the disk when this returns."""
        ...

    def close(self, exit_code: int) -> None:
        """Flush and close; how the process ends."""
        ...


class BackendStart(NamedTuple):
    """What a backend is opened with."""

    config: Config
    folder: RunFolder
    facts: dict[str, Any]  # the config as it is written down, and what was derived of it
    last_step: int  # up to here it was given everything for certain, and all of it holds; later steps come again


def read_steps_between(path: Path, after: int, last: int) -> Iterator[tuple[int, dict[str, Any], float | None]]:
    """(step, numbers, when it was trained) of a metrics.jsonl behind `after`, up to `last`."""
    for values in files.read_jsonl(path, say=lambda _: None):  # the tracker says what is damaged
        step = values.pop("step")
        time_s = values.pop("time_s", None)
        if after < step <= last:
            yield step, drop_texts(values), time_s


def drop_texts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without those that are text, which no curve can show."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}
