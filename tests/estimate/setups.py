"""Setups to estimate, from recipes."""

import dataclasses
from typing import Any

from smoltrain.config.load import load_config
from smoltrain.distributed.communication import sent_bytes
from smoltrain.estimate.traffic import list_collectives
from smoltrain.estimate.training_setup import TrainingSetup, build_training_setup

SMOL = "smollm2-135m"
QUICKSTART = (
    "batch.micro_batch=2", "batch.accumulation=4", "engine.precision=bf16", "engine.gradient_checkpointing=full",
    "model.tie_word_embeddings=true", "optimizer.kind=adamw", "optimizer.momentum=0.95",
)  # fmt: skip


def make_setup(
    *words: str, recipe: str = "quickstart", world: int = 1, device: Any = "cpu", **changes: Any
) -> TrainingSetup:
    defaults = QUICKSTART if recipe == "quickstart" else ()
    case = build_training_setup(load_config(recipe, [*defaults, *words]), world=world, device=device)
    return dataclasses.replace(case, **changes)


def sent_bytes_per_step(setup: TrainingSetup, *, shared_memory: bool = False) -> float:
    """By one rank, for a step's gradients and weights; in shared memory: read."""
    listed = list_collectives(setup, shared_memory=shared_memory)
    return sum(one.repetitions * sent_bytes(one.kind, one.num_bytes, setup.world) for one in listed)
