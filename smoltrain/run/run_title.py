"""The title of a run's pictures: its name, its size, and the loss that it has come to."""

from pathlib import Path

from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.load import read_run_config
from smoltrain.errors import UserError
from smoltrain.model.build import build_model, count_parameters
from smoltrain.run.axis_ticks import format_number, format_short
from smoltrain.run.run_metrics import RunMetrics


def describe_run_title(run: Path, metrics: RunMetrics) -> str:
    """One line. The loss is the last one on held-out rows, or else that of training."""
    parts = [run.resolve().name]
    num_parameters = count_run_parameters(run)
    if num_parameters is not None:
        parts.append(f"{format_short(num_parameters)} parameters")
    for what in ("validation", "train"):
        steps, losses = metrics.series(f"{what}/loss_nats_per_token")
        if len(losses):
            name = "training" if what == "train" else what
            parts.append(f"{name} loss {format_number(float(losses[-1]))} at step {steps[-1]:,}")
            break
    return ", ".join(parts)


def count_run_parameters(run: Path) -> int | None:
    """Parameters of a run's model; None where this process cannot build it (a program's own), or has no config."""
    if not (run / CONFIG_FILE).exists():
        return None
    try:
        return count_parameters(build_model(read_run_config(run / CONFIG_FILE).model, device="meta"))
    except UserError:
        return None
