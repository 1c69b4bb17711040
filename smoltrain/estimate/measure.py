"""Some real steps of a recipe on this machine, by the real launch/train.py, to correct the estimate with."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from smoltrain import config, cores, data, dist, files
from smoltrain.errors import TrainingStopped

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"
STEPS, WARM_UP = 20, 5  # the first ones compile


@dataclass(frozen=True)
class Measured:
    """What the run's own metrics say."""

    step_s: float  # median of the steps after warm-up
    peak_bytes: float  # of the largest rank


def measure(recipe: str, overrides: list[str], ranks: int, steps: int = STEPS) -> Measured:
    """Train the first phase for so many steps in a temporary folder, without evaluation, samples or W&B.

    Errors: UserError for the recipe and its data; TrainingStopped with the run's last words where it fails.
    """
    quiet = config.first_steps(config.load(recipe, overrides), steps)
    with tempfile.TemporaryDirectory() as scratch:
        words = [*quiet, "run.name=measure", f"run.folder={scratch}"]
        settings = config.load(recipe, [*overrides, *words])
        data.prepare(settings, settings.batch.rows(ranks), ranks)  # here: it takes memory that training does not
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            launcher += ["--master-port", str(dist.free_port())]
        own = dist.environment()
        own.setdefault("OMP_NUM_THREADS", str(cores.cores_each(ranks)))
        done = subprocess.run(
            [*launcher, str(SCRIPT), recipe, *overrides, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", env=own, check=False,
        )  # fmt: skip
        if done.returncode:
            what = f"the run that was to be measured ended with code {done.returncode}"
            raise TrainingStopped(f"{what}: {done.stdout[-500:].strip()}")
        lines = list(files.json_lines(Path(scratch, "measure", "metrics.jsonl")))
    return of_metrics(lines)


def of_metrics(lines: list[dict]) -> Measured:
    """What the lines of a metrics.jsonl tell; of a run of few steps the later half."""
    steps = [line for line in lines if "speed/step_s" in line]
    late = steps[min(WARM_UP, len(steps) // 2) :]
    peak_gib = max(line["memory/peak_gib"] for line in steps)
    return Measured(median(line["speed/step_s"] for line in late), peak_gib * 2**30)
