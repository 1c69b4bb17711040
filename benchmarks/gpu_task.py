"""What a GPU is measured by: SmolLM2-135M's shape at T 2048, trained in this process by `smoltrain.train` itself.

All that a run does is in its numbers: rows, the loop, records. Nothing of the trainer is called but what a program may.
"""

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import smoltrain
from benchmarks.random_rows import random_rows_overrides, write_random_rows
from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.estimate.constants import GIB
from smoltrain.estimate.measure import RUN_NAME, measurement_overrides
from smoltrain.training.callbacks import StepCallback

RECIPE = "smollm2-135m"
# What of the trainer's own choices stands beside a number, by the names under which a start says them.
TOLD_CHOICES = {"attention kernel": "attention", "loss kernel": "loss", "torch.compile": "compile"}
TINY_SHAPE = (
    "model.vocab_size=256",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.intermediate_size=64",
    "model.max_position_embeddings=64",
)


@dataclass(frozen=True)
class GpuTask:
    """The shape, and how long it is trained to be measured."""

    shape: tuple[str, ...]  # overrides of RECIPE
    sequence_length: int
    micro_batch: int  # rows
    rows_per_step: int
    warm_up: int  # steps that compile, allocate and fill caches
    steps: int  # behind these, that count
    peak_size: int | None = None  # of the products by which the device's peak is measured; None: as large as it needs

    @property
    def num_steps(self) -> int:
        """Of a run."""
        return self.warm_up + self.steps

    @property
    def tokens_per_step(self) -> int:
        """Targets of a step."""
        return self.rows_per_step * self.sequence_length

    def overrides(self, data: Path) -> list[str]:
        """Of RECIPE: the shape, the batch, and rows of random ids that `prepare_rows` has written."""
        return [
            *self.shape,
            f"batch.sequence_length={self.sequence_length}",
            f"batch.micro_batch={self.micro_batch}",
            f"batch.rows_per_step={self.rows_per_step}",
            *random_rows_overrides(data),
        ]

    def prepare_rows(self, data: Path) -> None:
        """Write as many rows as a run takes."""
        config = load_config(RECIPE, self.overrides(data))
        num_tokens = (self.num_steps + 2) * self.rows_per_step * (self.sequence_length + 1)
        write_random_rows(data, config.model.vocab_size, num_tokens, self.sequence_length)


FULL = GpuTask((), sequence_length=2048, micro_batch=16, rows_per_step=64, warm_up=3, steps=8)
TINY = GpuTask(TINY_SHAPE, sequence_length=32, micro_batch=2, rows_per_step=4, warm_up=2, steps=2, peak_size=256)


@dataclass(frozen=True)
class MeasuredTraining:
    """One run."""

    step_s: float  # mean over the steps behind warm-up
    first_step_s: float  # with everything before it: the start, compilation
    peak_gib: float
    last_loss: float  # nats per token
    choices: str  # of the trainer, in words
    data_wait_share: float | None  # the largest of these steps; None of another trainer, as is the next one
    save_pause_s: float | None  # training stood still for the checkpoint at the end


class StepClock:
    """A callback that notes when each step was done, and the share of it that was spent on waiting for rows.

    A GPU may still be at work on a step whose numbers are there. It is behind by the same at the first and the last
    step that count, so that it does not show in the mean of those between.
    """

    def __init__(self) -> None:
        self.done_at: list[float] = []
        self.wait_shares: list[float] = []

    def __call__(self, _step: int, metrics: dict) -> None:
        """Called by the trainer."""
        self.done_at.append(time.perf_counter())
        self.wait_shares.append(metrics["speed/data_wait_share"])


def load_task_config(task: GpuTask, words: Sequence[str], data: Path, folder: Path) -> Config:
    """A run of so many steps in a folder, of a plan as long as the recipe's: what is chosen may depend on that.

    Errors: UserError for the words.
    """
    words = [*task.overrides(data), *words]
    requested = load_config(RECIPE, words)
    config = load_config(RECIPE, [*words, *measurement_overrides(requested, task.num_steps, folder)])
    first = config.phases[0]
    rest = {"name": f"{first.name}-rest", "steps": sum(phase.num_steps for phase in requested.phases)}
    return config.model_copy(update={"phases": (first, first.model_copy(update=rest))})


def train_task(
    task: GpuTask, words: Sequence[str], data: Path, folder: Path, callbacks: Sequence[StepCallback] = ()
) -> MeasuredTraining:
    """Train it with these overrides in a folder that is gone afterwards; what the run says goes to FOLDER.log.

    Errors: UserError and TrainingStopped, and whatever torch raises.
    """
    folder.mkdir(parents=True)
    clock = StepClock()
    cuda = torch.cuda.is_available()
    gc.collect()  # what a run that failed has left, which its error has kept alive
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began_s = time.perf_counter()
        with folder.with_suffix(".log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            run = smoltrain.train(load_task_config(task, words, data, folder), callbacks=[*callbacks, clock])
        metrics = run.metrics()
        choices = json.loads((folder / RUN_NAME / "logs" / "choices.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder)
        torch.compiler.reset()  # else the next run would find what this one has compiled
    peak_gib = torch.cuda.max_memory_allocated() / GIB if cuda else np.nanmax(metrics["memory/peak_gib"])
    counted = clock.done_at[task.warm_up - 1 :]
    return MeasuredTraining(
        step_s=(counted[-1] - counted[0]) / task.steps,
        first_step_s=clock.done_at[0] - began_s,
        peak_gib=float(peak_gib),
        last_loss=float(metrics["train/loss_nats_per_token"][task.num_steps - 1]),
        choices=describe_choices(choices),
        data_wait_share=max(clock.wait_shares[task.warm_up :]),
        save_pause_s=float(metrics["speed/checkpoint_pause_s"][-1]),
    )


def describe_choices(choices: dict[str, str]) -> str:
    """Of what a start said, without its reasons: what was computed with, and when gradients were reduced."""
    told = [f"{short} {choices[name].partition(',')[0]}" for name, short in TOLD_CHOICES.items() if name in choices]
    when = [part for part in choices.get("gradients", "").split(", ") if part.startswith(("once", "after"))]
    return ", ".join([*told, *when[:1]])
