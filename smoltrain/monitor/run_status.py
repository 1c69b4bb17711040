"""The status of a run, and of all runs of a folder. Of long records only the end is read."""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.data.tokens.index import data_index_file
from smoltrain.errors import Problem, UserError
from smoltrain.files import METRICS_FILE
from smoltrain.monitor.run_state import STATES, State, find_run_state, read_run_plan
from smoltrain.monitor.tail import find_last_line, read_tail
from smoltrain.run.run_lock import is_run_locked
from smoltrain.run.time_left import STEP_S

TRAINING_LOSS = "train/loss_nats_per_token"
VALIDATION_LOSS = "validation/loss_nats_per_token"
TOKENS_PER_S = "speed/tokens_per_s"
TAIL_BYTES = 2**18  # some hundreds of lines: the last steps
SEARCH_BYTES = 2**26  # in which the last validation is looked for
RECENT_STEPS = 20  # whose mean throughput is told


@dataclass(frozen=True)
class RunStatus:
    """A run as others see it. None stands for what it has not said yet."""

    name: str
    folder: str
    state: State
    note: str
    step: int  # the last one that is trained
    last_step: int | None  # of the plan
    loss: float | None  # nats per token, of the last step
    validation_loss: float | None  # nats per token, the last one
    validation_step: int | None
    tokens_per_s: float | None  # all ranks, mean of the last steps
    last_sign_at: float | None  # when it wrote its last line, seconds since 1970

    def to_json(self) -> dict[str, Any]:
        """As plain values, NaN as text: JSON has none."""
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = str(value)
        return values


def read_run_status(folder: Path) -> RunStatus:
    """The status of the run in a folder."""
    path = folder / METRICS_FILE
    plan = read_run_plan(folder)
    trouble = ""
    lines: list[dict[str, Any]] = []
    validation: Mapping[str, Any] | None = None
    try:
        lines = files.parse_jsonl(read_tail(path, TAIL_BYTES))
        validation = find_last_line(path, f'"{VALIDATION_LOSS}"'.encode(), SEARCH_BYTES)
    except OSError as error:
        trouble = f"{path} cannot be read ({files.describe_error(error)})"
    steps = [line for line in lines if TRAINING_LOSS in line]
    newest = lines[-1] if lines else {}
    found = find_run_state(folder, plan, newest, time.time())
    return RunStatus(
        name=folder.name,
        folder=str(folder),
        state=found.state,
        note="; ".join(filter(None, (found.note, trouble))),
        step=newest.get("step", 0),
        last_step=plan.last_step if plan else None,
        loss=steps[-1][TRAINING_LOSS] if steps else None,
        validation_loss=validation[VALIDATION_LOSS] if validation else None,
        validation_step=validation["step"] if validation else None,
        tokens_per_s=mean_throughput(steps[-RECENT_STEPS:]),
        last_sign_at=newest.get("time_s") or _time_of_log(folder),
    )


def mean_throughput(steps: list[dict[str, Any]]) -> float | None:
    """Targets per second of these steps together, all ranks; None if none of them says so."""
    timed = [line for line in steps if line.get(STEP_S) and TOKENS_PER_S in line]
    seconds = sum(line[STEP_S] for line in timed)
    return sum(line[TOKENS_PER_S] * line[STEP_S] for line in timed) / seconds if seconds else None


def _time_of_log(folder: Path) -> float | None:
    """When rank 0 last wrote into its log; None if there is none."""
    try:
        return (folder / "logs" / "rank0.log").stat().st_mtime
    except OSError:
        return None


def list_run_folders(runs: Path) -> list[Path]:
    """The folders of runs: those that have begun, whose data are prepared, or that somebody is starting."""
    try:
        names = os.listdir(runs)  # noqa: PTH208 - glob would pass over a folder that cannot be read
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            Problem("the runs cannot be listed", files.describe_error(error), "a folder of runs", str(runs))
        ) from None
    found: set[Path] = set()
    for name in names:
        folder = runs / name
        if (folder / CONFIG_FILE).is_file() or data_index_file(folder).is_file():
            found.add(folder)
        elif name.startswith(".") and name.endswith(".lock") and is_run_locked(folder):
            found.add(runs / name[1 : -len(".lock")])
    return sorted(found)


def read_all_statuses(runs: Path) -> list[RunStatus]:
    """All runs of a folder: those that run first; of the others of a state, the one first that wrote last.

    Errors: UserError for a folder that cannot be read.
    """
    statuses = [read_run_status(folder) for folder in list_run_folders(runs)]
    order = list(STATES)
    return sorted(statuses, key=lambda status: (order.index(status.state), -(status.last_sign_at or 0.0), status.name))
