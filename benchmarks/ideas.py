"""Which idea makes a token teach more, each tried alone over several seeds: `python -m benchmarks.ideas --out FOLDER`.

Each run has one thread. What is in FOLDER is not run again, so that a stopped command goes on.
"""

import dataclasses
import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.command import make_app
from benchmarks.small_loop import Trial, load_trial_config, train_trial
from smoltrain.cli import run_app
from smoltrain.data.tokens.prepare import prepare_run_data

RESULTS = "results.jsonl"
TABLE = "ideas.md"
MIN_NOISES = 2.0  # by how much of its noise an idea must differ to have won or lost
# What loses by so many nats with the first seed is not tried with others: no idea's seeds are as far apart.
CLEAR_LOSS = 0.05

BASE = "muon"
IDEAS: dict[str, dict[str, Any]] = {
    BASE: {},
    "lr x 1/2": {"lr": 4e-3},
    "lr x 2": {"lr": 1.6e-2},
    "lr x 4": {"lr": 3.2e-2},
    "AdamW, lr 2e-3": {"optimizer": "adamw", "lr": 2e-3},
    "AdamW, lr 4e-3": {"optimizer": "adamw", "lr": 4e-3},
    "AdamW, lr 8e-3": {"optimizer": "adamw", "lr": 8e-3},
    "embedding lr x 1/2": {"embedding_lr_factor": 0.5},
    "embedding lr x 2": {"embedding_lr_factor": 2.0},
    "embedding lr x 4": {"embedding_lr_factor": 4.0},
    "linear decay to 0": {"schedule": "linear", "final_share": 0.0},
    "WSD, the last 40 % to 0": {"schedule": "wsd", "decay_share": 0.4, "final_share": 0.0},
    "no warm-up": {"warmup_steps": 1},
    "z-loss 1e-4": {"z_loss": 1e-4},
    "QK-norm": {"qk_norm": True},
    "embeddings of std 0.1": {"embedding_std": 0.1},
    "embeddings of std 1": {"embedding_std": 1.0},
    "residual projections from 0": {"residual_scale": 0.0},
    "beta2 0.9": {"beta2": 0.9},
    "beta2 0.99": {"beta2": 0.99},
    "momentum 0.9": {"momentum": 0.9},
    "momentum 0.8": {"momentum": 0.8},
    "momentum rises from 0.85": {"momentum_warmup_steps": 60},
    "3 Newton-Schulz steps": {"newton_schulz_steps": 3},
    "4 Newton-Schulz steps": {"newton_schulz_steps": 4},
    "batch ramp": {"ramp_share": 0.5},
    "weight decay 0": {"weight_decay": 0.0},
    "weight decay falls with lr": {"decay_falls_with_lr": True},
    "untied head": {"tied": False},
    "no gradient clipping": {"gradient_clipping": 0.0},
}

Losses = Mapping[str, Mapping[int, float]]  # nats per token by idea and seed


class Row(NamedTuple):
    """A line of the table."""

    name: str
    num_seeds: int
    loss: float  # mean over seeds
    difference: float  # to the base with the same seeds, mean
    noise: float | None  # standard deviation of these differences; None of one seed

    @property
    def verdict(self) -> str:
        """In words."""
        if self.noise is None:
            return "loses clearly, not tried again" if self.difference > CLEAR_LOSS else "one seed"
        if abs(self.difference) <= MIN_NOISES * self.noise:
            return "within its noise"
        return "better" if self.difference < 0 else "worse"


def benchmark_ideas(
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, the table, and the prepared rows.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of each idea.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="An idea, as the table names it; several by several.")] = None,
) -> None:
    """Train each idea with several seeds and write a table of how much better it is than the base."""
    out.mkdir(parents=True, exist_ok=True)
    names = [BASE, *(only or [name for name in IDEAS if name != BASE])]
    for seed in range(1, seeds + 1):
        losses = read_losses(out / RESULTS)
        missing = [name for name in names if seed not in losses.get(name, {}) and not has_lost_clearly(name, losses)]
        run_trials(missing, seed, out, workers)
    table = format_table(read_losses(out / RESULTS))
    (out / TABLE).write_text(table, encoding="utf-8")
    print(table)


def run_trials(names: list[str], seed: int, out: Path, workers: int) -> None:
    """Train these ideas with a seed, so many at a time, and append what comes out."""
    words = [f"run.folder={out / 'runs'}", f"run.name=seed-{seed}", "track.wandb=off"]
    prepare_run_data(load_trial_config(seed, words))  # once, and not by two runs at a time
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(train_trial, Trial(**IDEAS[name]), seed, words): name for name in names}
        for future in as_completed(futures):
            name = futures[future]
            result = {
                "idea": name,
                "seed": seed,
                **future.result(),
                "settings": dataclasses.asdict(Trial(**IDEAS[name])),
            }
            with (out / RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{name}, seed {seed}: {result['validation']:.4f}", flush=True)


def read_losses(file: Path) -> dict[str, dict[int, float]]:
    """What has been measured so far, by idea and seed. A result of other settings than today's does not count."""
    losses: dict[str, dict[int, float]] = {}
    if not file.exists():
        return losses
    for line in file.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        name = result["idea"]
        if name in IDEAS and result["settings"] == dataclasses.asdict(Trial(**IDEAS[name])):
            losses.setdefault(name, {})[result["seed"]] = result["validation"]
    return losses


def has_lost_clearly(name: str, losses: Losses) -> bool:
    """Whether an idea's first seed says enough."""
    base = losses.get(BASE, {})
    found = losses.get(name, {})
    return 1 in base and 1 in found and found[1] - base[1] > CLEAR_LOSS


def make_rows(losses: Losses) -> list[Row]:
    """The table's lines in the order of IDEAS; the base's noise is that of its losses."""
    base = losses[BASE]
    rows: list[Row] = []
    for name in IDEAS:
        found = losses.get(name, {})
        seeds = sorted(set(found) & set(base))
        if not seeds:
            continue
        differences = [found[seed] - base[seed] for seed in seeds]
        values = list(base.values()) if name == BASE else differences
        noise = round(stdev(values), 3) if len(values) > 1 else None  # as a reader sees it, who may check the verdict
        loss = mean(found[seed] for seed in seeds)
        rows.append(Row(name, len(seeds), round(loss, 3), round(mean(differences), 3), noise))
    return rows


def format_table(losses: Losses) -> str:
    """The table in Markdown."""
    lines = ["| idea | seeds | validation | against the base | noise | |", "|---|---|---|---|---|---|"]
    for row in make_rows(losses):
        noise = "" if row.noise is None else f"{row.noise:.3f}"
        difference = "" if row.name == BASE else f"{row.difference:+.3f}"
        verdict = "the base" if row.name == BASE else row.verdict
        lines.append(f"| {row.name} | {row.num_seeds} | {row.loss:.3f} | {difference} | {noise} | {verdict} |")
    return "\n".join(lines) + "\n"


app = make_app(benchmark_ideas, "--out /tmp/ideas --only QK-norm --seeds 1")

if __name__ == "__main__":
    run_app(app)
