"""The runs of a grid: what each is made of, where it lives, and what its folder says of how it ended.

A run's name has a digest of all that its weights depend on. So the same command finds its runs again, another grid
those that fit, and a run of other steps or another recipe is never taken for one of these.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from smoltrain import files
from smoltrain.config.load import redacted_config
from smoltrain.config.schema import Config, PhaseSection
from smoltrain.run.run_folder import SPIKES_FILE
from smoltrain.run.summary import VALIDATION_LOSS
from smoltrain.run.time_left import STEP_S
from smoltrain.tune.grid import GridPoint, describe_point, name_run

FOLDER_PREFIX = "tune-"  # of the folder of all runs of a recipe, before its name
CACHE_FOLDER = "cache"  # in it: tokenizer and tokens, which all runs share
VALIDATIONS = 4  # of a run, for its curve, unless evaluate.every says otherwise; the last one is the result
# Before the words of the command line, which win: what a run of a grid does without.
QUIET_WORDS = (
    "sample.every=0",
    "track.to=[wandb]",
    "track.wandb=off",
    "track.gradients_every=0",
    "checkpoint.keep_last=1",
    "checkpoint.keep_every=0",
    "checkpoint.keep_best=false",
)
WEIGHTLESS_SECTIONS = ("checkpoint", "track", "sample", "generation", "export")  # whose keys no weight depends on


@dataclass(frozen=True)
class Trial:
    """One run: a point of the grid, trained with one seed."""

    point: GridPoint
    config: Config  # whole: the very run, in its own folder

    @property
    def seed(self) -> int:
        """Of weights, dropout and the order of the rows."""
        return self.config.run.seed

    @property
    def folder(self) -> Path:
        """The run's own."""
        return self.config.run_folder

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config.phases[0].num_steps

    def __str__(self) -> str:
        return f"{describe_point(self.point)}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended. Losses in nats per token."""

    loss: float  # of the validation at the last step; NaN if it diverged
    diverged_at: int | None  # the step whose loss was no number, or a spike that ended the run
    tokens_per_s: float  # targets of a step over its seconds, the median step; NaN if none was trained
    ledger: str  # digest of all rows that were trained on
    validations: tuple[tuple[int, float], ...]  # (step, loss) of every one


def tuning_folder(config: Config) -> Path:
    """Where the runs of a recipe's grids live, with what they share and what they came to."""
    return config.run.folder / f"{FOLDER_PREFIX}{config.run.name}"


def make_trial(
    point: GridPoint, config: Config, phase: PhaseSection, seed: int, rows_per_step: int, cache: Path | None,
    evaluate_every: int,
) -> Trial:  # fmt: skip
    """The run of a point: its config with this phase alone, in a folder of its own.

    `cache` is where tokens are shared; None: not in cached mode.
    """
    home = tuning_folder(config)
    run = {"folder": home, "seed": seed, "stop_after": None}
    sections: dict[str, Any] = {
        "run": config.run.model_copy(update=run),
        "phases": (phase,),
        "evaluate": config.evaluate.model_copy(update={"every": evaluate_every}),
    }
    if config.track.wandb_group is None:
        sections["track"] = config.track.model_copy(update={"wandb_group": home.name})
    if cache is not None and config.data.cache is None:
        sections["data"] = config.data.model_copy(update={"cache": cache})
    config = config.model_copy(update=sections)
    name = name_run(point, seed, _content_of_run(config, rows_per_step))
    return Trial(point, config.model_copy(update={"run": config.run.model_copy(update={"name": name})}))


def _content_of_run(config: Config, rows_per_step: int) -> str:
    """All that the weights of a run depend on, and what its losses are measured with, as text."""
    tree = redacted_config(config)
    for section in WEIGHTLESS_SECTIONS:
        del tree[section]
    tree["run"] = tree["run"]["seed"]
    del tree["data"]["cache"]
    del tree["engine"]["hang_s"]
    return json.dumps([tree, rows_per_step], sort_keys=True)


def read_outcome(trial: Trial) -> Outcome | None:
    """How the run ended, by its own records; None if it is to be trained, or trained further."""
    lines = list(files.read_jsonl(trial.folder / files.METRICS_FILE))
    steps = [line for line in lines if STEP_S in line]
    validations = tuple((line["step"], line[VALIDATION_LOSS]) for line in lines if VALIDATION_LOSS in line)
    speed = median(line["speed/tokens_per_s"] for line in steps) if steps else math.nan
    ledger = steps[-1].get("data/ledger", "") if steps else ""
    last_losses = [loss for step, loss in validations if step == trial.steps]
    if last_losses and math.isfinite(last_losses[-1]):
        return Outcome(last_losses[-1], None, speed, ledger, validations)
    diverged_at = trial.steps if last_losses else _find_fatal_spike(trial.folder)
    if diverged_at is None:
        return None
    return Outcome(math.nan, diverged_at, speed, ledger, validations)


def _find_fatal_spike(folder: Path) -> int | None:
    """The step of the spike that ended a run; None if none did."""
    spikes = list(files.read_jsonl(folder / SPIKES_FILE, ("step", "does")))
    return spikes[-1]["step"] if spikes and spikes[-1]["does"] == "stop" else None


def find_other_rows(trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> list[tuple[Trial, Trial]]:
    """Pairs of runs of one seed, both whole, that did not train on the same rows: by their ledgers."""
    first_of_seed: dict[int, tuple[Trial, str]] = {}
    pairs: list[tuple[Trial, Trial]] = []
    for trial, outcome in zip(trials, outcomes, strict=True):
        if outcome.diverged_at is not None:
            continue
        first, ledger = first_of_seed.setdefault(trial.seed, (trial, outcome.ledger))
        if outcome.ledger != ledger:
            pairs.append((first, trial))
    return pairs
