"""What checkpoints cost a run: `smoltrain bench checkpoint`.

A real run of two or more ranks is trained twice, once with checkpoints written beside training and once with training
waiting for them, and its own metrics.jsonl is read. A save costs the seconds that training stood still, and what the
steps right behind it took longer than others, as the writer needs cores too.
"""

import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.about import describe_benchmark
from smoltrain import files
from smoltrain.config.load import load_config, measurement_overrides
from smoltrain.errors import TrainingStopped

WARM_UP = 4  # steps that are slower than all others
BESIDE = 12  # steps behind a save in which its files may still be in the making
PACKAGES = ("deepspeed", "safetensors")


@dataclass(frozen=True)
class SaveCost:
    """What one run tells, in seconds; medians over its saves and its undisturbed steps."""

    saves: int
    step_s: float
    pause_s: float  # training stood still, the slowest rank
    slowdown_s: float  # the BESIDE steps behind a save took this much longer than as many others

    def share(self, every: int) -> float:
        """Of a run's time that goes into saving every so many steps."""
        lost = self.pause_s + self.slowdown_s
        return lost / (every * self.step_s + lost)


def benchmark_checkpoint(recipe: str, overrides: list[str], saves: int, every: int, out: Path) -> None:
    """Measure, print a table, and write `out` (JSON). Errors: UserError for the recipe; TrainingStopped."""
    settings = load_config(recipe, overrides)
    out.parent.mkdir(parents=True, exist_ok=True)
    steps = WARM_UP + saves * 2 * BESIDE
    print(f"trains {settings.run.name} for {steps} steps, twice", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            name: _train_and_measure(recipe, overrides, Path(scratch, name), steps, name) for name in ("true", "false")
        }
    words = {"true": "beside training", "false": "training waits"}
    table = Table("", "saves", "step\ns", "stood still\ns", "slower steps\ns", f"share of a run\nsaving every {every}")
    for name, cost in found.items():
        numbers = (f"{value:.2f}" for value in (cost.step_s, cost.pause_s, cost.slowdown_s))
        table.add_row(words[name], str(cost.saves), *numbers, f"{cost.share(every):.1%}")
    Console(markup=False, highlight=False).print(table)
    measured = {words[name]: asdict(cost) | {"share": cost.share(every)} for name, cost in found.items()}
    depends = {"recipe": recipe, "overrides": overrides, "steps": steps, "every": every}
    files.write_json_file(out, describe_benchmark(depends, PACKAGES) | {"measured": measured})
    print(out)


def compute_save_cost(lines: list[dict]) -> SaveCost:
    """What the lines of a metrics.jsonl tell."""
    took = {line["step"]: line["speed/step_s"] for line in lines if "speed/step_s" in line}
    pauses = {line["step"]: line["speed/checkpoint_pause_s"] for line in lines if "speed/checkpoint_pause_s" in line}
    pauses.pop(max(took), None)  # nothing is trained behind the last one
    beside = {step: [took[step + i] for i in range(1, BESIDE + 1) if step + i in took] for step in pauses}
    disturbed = {step + i for step in pauses for i in range(1, BESIDE + 1)}
    clean = median(s for step, s in took.items() if step > WARM_UP and step not in disturbed)
    slowdown = median(sum(steps) - len(steps) * clean for steps in beside.values())
    return SaveCost(len(pauses), clean, median(pauses.values()), max(0.0, slowdown))


def _train_and_measure(recipe: str, overrides: list[str], folder: Path, steps: int, background: str) -> SaveCost:
    words = [
        *measurement_overrides(load_config(recipe, overrides), steps), "run.name=bench", f"run.folder={folder}",
        f"checkpoint.every={2 * BESIDE}", "checkpoint.keep_last=1", f"checkpoint.background={background}",
    ]  # fmt: skip
    command = [str(Path(sys.executable).with_name("smoltrain")), "train", recipe, *overrides, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        what = f"the run that was to be measured ended with code {done.returncode}"
        raise TrainingStopped(f"{what}: {done.stdout[-500:]}")
    return compute_save_cost(list(files.read_jsonl(folder / "bench" / "metrics.jsonl")))
