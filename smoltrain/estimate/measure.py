"""Some real steps of a recipe on this machine, by real ranks, to correct the estimate with."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from smoltrain import files
from smoltrain.config.load import load_config, measurement_overrides
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.distributed.cpu_cores import cores_per_process
from smoltrain.distributed.world import environment_without_launcher, free_port
from smoltrain.errors import TrainingStopped

RANK_MODULE = "smoltrain.launch.rank"
STEPS, WARM_UP = 20, 5  # the first ones compile


@dataclass(frozen=True)
class MeasuredRun:
    """What the run's own metrics say."""

    step_s: float  # median of the steps after warm-up
    peak_bytes: float  # of the largest rank


def measure_run(recipe: str, overrides: list[str], ranks: int, steps: int = STEPS) -> MeasuredRun:
    """Train the first phase for so many steps in a temporary folder, without evaluation, samples or W&B.

    Errors: UserError for the recipe and its data; TrainingStopped with the run's last words where it fails.
    """
    quiet = measurement_overrides(load_config(recipe, overrides), steps)
    with tempfile.TemporaryDirectory() as scratch:
        words = [*quiet, "run.name=measure", f"run.folder={scratch}"]
        settings = load_config(recipe, [*overrides, *words])
        prepare_run_data(settings, settings.batch.rows(ranks), ranks)  # here: it takes memory that training does not
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            launcher += ["--master-port", str(free_port())]
        own = environment_without_launcher()
        own.setdefault("OMP_NUM_THREADS", str(cores_per_process(ranks)))
        done = subprocess.run(
            [*launcher, "-m", RANK_MODULE, recipe, *overrides, *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", env=own, check=False,
        )  # fmt: skip
        if done.returncode:
            what = f"the run that was to be measured ended with code {done.returncode}"
            raise TrainingStopped(f"{what}: {done.stdout[-500:].strip()}")
        lines = list(files.read_jsonl(Path(scratch, "measure", "metrics.jsonl")))
    return summarize_run_metrics(lines)


def summarize_run_metrics(lines: list[dict]) -> MeasuredRun:
    """What the lines of a metrics.jsonl tell; of a run of few steps the later half."""
    steps = [line for line in lines if "speed/step_s" in line]
    late = steps[min(WARM_UP, len(steps) // 2) :]
    peak_gib = max(line["memory/peak_gib"] for line in steps)
    return MeasuredRun(median(line["speed/step_s"] for line in late), peak_gib * 2**30)
