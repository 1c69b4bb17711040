"""A few real steps and their checkpoints, on the ranks of a test."""

from typing import Any

import torch

from smoltrain.checkpoint.manifest import Manifest, step_folder, verify_checkpoint
from smoltrain.checkpoint.restore import restore_checkpoint
from smoltrain.checkpoint.saver import CheckpointSaver
from smoltrain.config.schema import CheckpointSection, Config
from smoltrain.schedule import Plan
from tests.engine.test_engine import fresh_model, loader_of
from tests.ranks import world
from tests.sessions import bare_session, train_steps

FACTS: dict[str, Any] = {
    "precision": "bf16", "skipped_updates": 0, "wandb_id": "abc", "validation_loss": None, "validation_rows": 8,
    "identity": {"run_id": "abc", "rows_per_step": 8, "values": {}, "phases": []},
}  # fmt: skip


def trained(settings: Config, steps: int) -> tuple[Any, Any, Plan]:
    """An engine and its loader after some steps, on this rank; 8 rows per step on one rank or two."""
    from smoltrain.engine.build_engine import build_engine

    here, plan, accumulation = world(), Plan(settings.phases), 4 // world().size
    torch.manual_seed(here.rank)
    wrapped = build_engine(fresh_model(settings), settings, here, precision="bf16", accumulation=accumulation)
    loader = loader_of(settings, here.rank, here.size, accumulation)
    run_steps(range(1, steps + 1), settings, wrapped, loader)
    return wrapped, loader, plan


def run_steps(steps: range, settings: Config, wrapped: Any, loader: Any) -> list[float]:
    """The losses of these steps."""

    results = train_steps(steps, bare_session(settings, wrapped, loader))
    return [float(r.metrics["train/loss_nats_per_token"]) for r in results]


def saver_of(settings: Config, plan: Plan, **options: Any) -> CheckpointSaver:
    section = CheckpointSection.model_validate({"keep_last": 9} | options)
    return CheckpointSaver(settings.run_folder / "checkpoints", world(), plan, section, say=lambda _: None)


def save_steps(settings: Config, steps: list[int], keep_last: int) -> None:
    wrapped, loader, plan = trained(settings, 1)
    writer = saver_of(settings, plan, keep_last=keep_last)
    for step in steps:
        writer.start_save(step, wrapped, loader, **FACTS)
    writer.finish()


def restore(settings: Config, step: int, wrapped: Any, loader: Any) -> None:
    folder = step_folder(settings.run_folder / "checkpoints", step)
    manifest = verify_checkpoint(folder)
    assert isinstance(manifest, Manifest)
    restore_checkpoint(folder, manifest, wrapped, loader, world(), seed=settings.run.seed)
