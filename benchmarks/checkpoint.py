"""What checkpoints cost a run: `python -m benchmarks.checkpoint`.

A real run of two or more ranks is trained twice, once with checkpoints written beside training and once with training
waiting for them, and its own metrics.jsonl is read. A save costs the seconds that training stood still, and what the
steps right behind it took longer than others, as the writer needs cores too.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.command import OUT, OutOption, make_app, make_console, write_result
from smoltrain.cli import OverridesArgument, RecipeArgument, run_app
from smoltrain.config.load import load_config
from smoltrain.estimate.measure import measurement_overrides, run_for_metrics

WARM_UP = 4  # steps that are slower than all others
BESIDE = 12  # steps behind a save in which its files may still be in the making
PACKAGES = ("deepspeed", "safetensors")
WAYS = {"true": "beside training", "false": "training waits"}  # by checkpoint.background


@dataclass(frozen=True)
class SaveCost:
    """What one run tells, in seconds; medians over its saves and its undisturbed steps."""

    saves: int
    step_s: float
    pause_s: float  # training stood still, the slowest rank
    slowdown_s: float  # the BESIDE steps behind a save took this much longer than as many others

    def share_of_run(self, every: int) -> float:
        """Of a run's time that goes into saving every so many steps."""
        lost_s = self.pause_s + self.slowdown_s
        return lost_s / (every * self.step_s + lost_s)


def benchmark_checkpoint(
    recipe: RecipeArgument = "quickstart",
    overrides: OverridesArgument = None,
    saves: Annotated[int, typer.Option(min=2, help="Checkpoints in each of the two runs.")] = 3,
    every: Annotated[int, typer.Option(min=1, help="Steps between saves, for the share of a run that is told.")] = 200,
    out: OutOption = OUT,
) -> None:
    """Measure what saving costs a run: with its files written beside training, and with training waiting for them.

    Errors: UserError for the recipe; TrainingStopped.
    """
    overrides = overrides or []
    config = load_config(recipe, overrides)
    out.parent.mkdir(parents=True, exist_ok=True)
    steps = WARM_UP + saves * 2 * BESIDE
    print(f"trains {config.run.name} for {steps} steps, twice", flush=True)
    costs: dict[str, SaveCost] = {}
    for background, way in WAYS.items():
        with tempfile.TemporaryDirectory() as scratch:
            words = [
                *overrides, *measurement_overrides(config, steps, Path(scratch)),
                f"checkpoint.every={2 * BESIDE}", "checkpoint.keep_last=1", f"checkpoint.background={background}",
            ]  # fmt: skip
            smoltrain = str(Path(sys.executable).with_name("smoltrain"))
            costs[way] = compute_save_cost(run_for_metrics([smoltrain, "train", recipe, *words], Path(scratch)))
    table = Table("", "saves", "step\ns", "stood still\ns", "slower steps\ns", f"share of a run\nsaving every {every}")
    for way, cost in costs.items():
        seconds = (f"{value:.2f}" for value in (cost.step_s, cost.pause_s, cost.slowdown_s))
        table.add_row(way, str(cost.saves), *seconds, f"{cost.share_of_run(every):.1%}")
    make_console().print(table)
    settings = {"recipe": recipe, "overrides": overrides, "steps": steps, "every": every}
    measured = {way: asdict(cost) | {"share": cost.share_of_run(every)} for way, cost in costs.items()}
    write_result(out, settings, PACKAGES, {"measured": measured})


def compute_save_cost(lines: list[dict]) -> SaveCost:
    """What the lines of a metrics.jsonl tell."""
    took = {line["step"]: line["speed/step_s"] for line in lines if "speed/step_s" in line}
    pauses = {line["step"]: line["speed/checkpoint_pause_s"] for line in lines if "speed/checkpoint_pause_s" in line}
    pauses.pop(max(took), None)  # nothing is trained behind the last one
    behind = {save: [step for step in range(save + 1, save + BESIDE + 1) if step in took] for save in pauses}
    disturbed = {step for steps in behind.values() for step in steps}
    clean_s = median(s for step, s in took.items() if step > WARM_UP and step not in disturbed)
    slowdowns = [sum(took[step] - clean_s for step in steps) for steps in behind.values()]
    return SaveCost(len(pauses), clean_s, median(pauses.values()), max(0.0, median(slowdowns)))


app = make_app(benchmark_checkpoint, "shakespeare-80m --saves 3")

if __name__ == "__main__":
    run_app(app)
