"""Which checkpoints are kept, and how one is deleted without ever looking like a damaged one."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from smoltrain import files
from smoltrain.checkpoint.manifest import Manifest, list_checkpoint_steps, read_manifest, step_folder
from smoltrain.config.schema import CheckpointSection
from smoltrain.schedule import Plan


def steps_to_keep(losses: Mapping[int, float | None], plan: Plan, section: CheckpointSection) -> set[int]:
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


def prune_checkpoints(checkpoints: Path, published: int, plan: Plan, section: CheckpointSection) -> list[str]:
    """Delete what is not to be kept, after that of the step `published` was; one of a later step did not verify.

    What is left, as it cannot be deleted, in a line each.
    """
    losses: dict[int, float | None] = {}
    for step in (step for step in list_checkpoint_steps(checkpoints) if step <= published):
        if (folder := step_folder(checkpoints, step)).is_dir():  # a file of that name is none of ours
            manifest = read_manifest(folder)
            losses[step] = manifest.validation_loss if isinstance(manifest, Manifest) else None
    old = [step_folder(checkpoints, step) for step in sorted(losses.keys() - steps_to_keep(losses, plan, section))]
    return [line for folder in old if (line := _try_delete(delete_checkpoint, folder))]


def delete_leftovers(checkpoints: Path) -> list[str]:
    """Delete what a crash, or a signal, left half done. One process calls this, while nobody saves.

    What is left, as it cannot be deleted, in a line each.
    """
    return [line for leftover in sorted(checkpoints.glob("step-*.tmp")) if (line := _try_delete(delete_path, leftover))]


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint: it leaves by a rename, so that a crash midway leaves no half of one behind.

    One that lies elsewhere, behind a link, stays there: the link alone is deleted. Errors: OSError.
    """
    leaving = folder.with_name(f"{folder.name}.old.tmp")
    delete_path(leaving)
    folder.rename(leaving)
    delete_path(leaving)


def delete_path(path: Path) -> None:
    """Delete a file, a link (not what it leads to), or a folder with all that is in it. Errors: OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _try_delete(delete: Callable[[Path], None], path: Path) -> str:
    """What to say of it: nothing, once it is deleted."""
    try:
        delete(path)
    except OSError as error:  # nothing is lost by it but room on the disk
        return f"WARNING: {path} is left over and could not be deleted ({files.describe_error(error)})"
    return ""
