"""Real steps of a recipe on this machine, to measure something: by how much the estimate is off, what a save costs."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from smoltrain import files
from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.distributed.cpu_cores import cores_per_process
from smoltrain.distributed.world import environment_without_launcher, free_port
from smoltrain.errors import TrainingStopped
from smoltrain.estimate.constants import GIB

RANK_MODULE = "smoltrain.launch.rank"
STEPS, WARM_UP = 20, 5  # the first ones compile
RUN_NAME = "measured"


@dataclass(frozen=True)
class MeasuredRun:
    """What the run's own metrics say."""

    step_s: float  # median of the steps after warm-up
    peak_bytes: float  # of the largest rank


def measurement_overrides(config: Config, steps: int, folder: Path) -> list[str]:
    """Overrides by which its recipe trains so many steps of its first phase in a folder, and does nothing beside.

    From fresh weights: a run that goes on from another one would begin behind these steps. They come behind the words
    of a command line, which may give the phase another length in tokens or epochs.
    """
    phase = config.phases[0]
    return [
        f"run.name={RUN_NAME}", f"run.folder={folder}", f"run.stop_after={phase.name}",
        "init.from=null", "init.load=weights",
        f"phases.{phase.name}.tokens=null", f"phases.{phase.name}.epochs=null",
        f"phases.{phase.name}.steps={steps}", f"phases.{phase.name}.warmup_steps=0",
        f"phases.{phase.name}.decay_steps={steps if phase.decay_steps else 0}", "evaluate.every=0",
        "evaluate.tasks_every=0", "evaluate.memorisation_every=0", "sample.every=0", "checkpoint.every=0",
        "track.gradients_every=0", "track.to=[]",
    ]  # fmt: skip


def run_for_metrics(command: Sequence[str], folder: Path, env: Mapping[str, str] = os.environ) -> list[dict]:
    """Run a command that trains with measurement_overrides; the lines of its metrics.jsonl.

    Errors: TrainingStopped with the run's last words where it fails.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env, check=False
    )
    if done.returncode:
        what = f"the run that was to be measured ended with code {done.returncode}"
        raise TrainingStopped(f"{what}: {done.stdout[-500:].strip()}")
    return list(files.read_jsonl(folder / RUN_NAME / "metrics.jsonl"))


def measure_run(recipe: str, overrides: list[str], ranks: int, steps: int = STEPS) -> MeasuredRun:
    """Train the first phase for so many steps in a temporary folder, without evaluation, samples or W&B.

    Errors: UserError for the recipe and its data; TrainingStopped with the run's last words where it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        words = [*overrides, *measurement_overrides(load_config(recipe, overrides), steps, Path(scratch))]
        return summarize_run_metrics(train_measured(recipe, words, ranks, Path(scratch)))


def train_measured(
    recipe: str, words: list[str], ranks: int, folder: Path, environment: Mapping[str, str] | None = None
) -> list[dict]:
    """Prepare the data and train, with measurement_overrides for this folder among the words; the lines of metrics.

    `environment` is added to this process's. Errors: as measure_run.
    """
    config = load_config(recipe, words)
    prepare_run_data(config, config.batch.rows(ranks), ranks)  # here: it takes memory that training does not
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        launcher += ["--master-port", str(free_port())]
    env = environment_without_launcher() | dict(environment or {})
    env.setdefault("OMP_NUM_THREADS", str(cores_per_process(ranks)))
    return run_for_metrics([*launcher, "-m", RANK_MODULE, recipe, *words], folder, env)


def summarize_run_metrics(lines: list[dict]) -> MeasuredRun:
    """What the lines of a metrics.jsonl tell; of a run of few steps the later half."""
    steps = [line for line in lines if "speed/step_s" in line]
    late = steps[min(WARM_UP, len(steps) // 2) :]
    peak_gib = max(line["memory/peak_gib"] for line in steps)
    return MeasuredRun(median(line["speed/step_s"] for line in late), peak_gib * GIB)
