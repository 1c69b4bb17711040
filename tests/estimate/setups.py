"""Setups to estimate, from recipes."""

import dataclasses
from typing import Any

from smoltrain.config.load import load_config
from smoltrain.estimate.training_setup import TrainingSetup, build_training_setup

SMOL = "smollm2-135m"


def make_setup(
    *words: str, recipe: str = "quickstart", world: int = 1, device: Any = "cpu", **changes: Any
) -> TrainingSetup:
    case = build_training_setup(load_config(recipe, list(words)), world=world, device=device)
    return dataclasses.replace(case, **changes)
