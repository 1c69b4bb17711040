"""Which checkpoints are kept, and how one is deleted without ever looking like a damaged one."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from smoltrain.checkpoint.manifest import Manifest, folder_of, read_manifest, steps
from smoltrain.plan import Plan
from smoltrain.schema import CheckpointSection


def kept(losses: Mapping[int, float | None], plan: Plan, section: CheckpointSection) -> set[int]:
    """The steps to keep, of those that have a checkpoint, with their validation losses (nats per token, or None).

    The newest `keep_last`, the ends of phases, the multiples of `keep_every`, and the best if `keep_best`.
    """
    keep = set(sorted(losses)[-section.keep_last :])
    keep |= losses.keys() & {phase.last for phase in plan.phases}
    if section.keep_every:
        keep |= {step for step in losses if step % section.keep_every == 0}
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    if section.keep_best and measured:
        keep.add(min(measured, key=lambda step: (measured[step], step)))
    return keep


def prune(checkpoints: Path, published: int, plan: Plan, section: CheckpointSection) -> None:
    """Delete what is not to be kept, after that of the step `published` was; one of a later step did not verify."""
    losses: dict[int, float | None] = {}
    for step in (step for step in steps(checkpoints) if step <= published):
        manifest = read_manifest(folder_of(checkpoints, step))
        losses[step] = manifest.validation_loss if isinstance(manifest, Manifest) else None
    for step in losses.keys() - kept(losses, plan, section):
        discard(folder_of(checkpoints, step))


def discard(folder: Path) -> None:
    """Delete a checkpoint: it leaves by a rename, so that a crash midway leaves no half of one behind."""
    leaving = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)
