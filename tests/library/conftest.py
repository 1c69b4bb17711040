"""One finished run for all tests of the library, trained in this process on documents of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import smoltrain
from smoltrain.training import loop
from tests import tiny

TEXTS = [f"{place} met {other} on the road. " * 20 for place in tiny.PLACES for other in tiny.PLACES[:3]]
FEW = {
    "phases.main.steps": 2, "phases.main.warmup_steps": 1, "phases.continuation.steps": 1, "evaluate.every": 2,
    "sample.every": 2, "checkpoint.every": 0, "engine.gradient_checkpointing": "none",
}  # fmt: skip


def load_tiny(folder: Path, name: str, **values: Any) -> smoltrain.Config:
    """The config of three tiny steps; `values` are sections."""
    words = [word for word in tiny.OVERRIDES if not word.startswith(("data.package", "data.pattern"))]
    few = [f"{key}={value}" for key, value in FEW.items()]
    return smoltrain.load_config("quickstart", [*words, *few, f"run.folder={folder}", f"run.name={name}"], **values)


@dataclass
class Trained:
    run: smoltrain.Run
    steps: list[int]  # that the callback saw


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    steps: list[int] = []

    def square(step: int, metrics: dict[str, Any]) -> dict[str, float]:
        assert metrics["train/loss_nats_per_token"] > 0
        steps.append(step)
        return {"square": step**2}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_run", lambda *_: None)
        config = load_tiny(tmp_path_factory.mktemp("library"), "trained")
        run = smoltrain.train(config, documents=iter(TEXTS), callbacks=[square])
    return Trained(run, steps)
