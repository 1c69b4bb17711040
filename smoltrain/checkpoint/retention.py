"""Which checkpoints are kept, and how one is deleted without ever looking like a damaged one."""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from smoltrain import files
from smoltrain.checkpoint.manifest import Manifest, list_checkpoint_steps, read_manifest, step_folder
from smoltrain.config.schema import CheckpointSection
from smoltrain.schedule import Plan


class Validation(NamedTuple):
    """What a checkpoint's manifest says of the evaluation at its step."""

    loss: float | None  # nats per token; None if there was none
    rows: int  # evaluate.rows then


def steps_to_keep(validations: Mapping[int, Validation], plan: Plan, section: CheckpointSection) -> set[int]:
    """The steps to keep, of those that have a checkpoint.

    The newest `keep_last`, the ends of phases, the multiples of `keep_every`, and the best if `keep_best`: the lowest
    finite loss, as for whoever logs it (min would take a nan that comes first). Losses on as many rows are compared
    with each other alone: where evaluate.rows has changed, the best by either measure stays.
    """
    keep = set(sorted(validations)[-section.keep_last :])
    keep |= validations.keys() & {phase.last for phase in plan.phases}
    if section.keep_every:
        keep |= {step for step in validations if step % section.keep_every == 0}
    best: dict[int, tuple[float, int]] = {}  # rows -> (loss, step)
    for step, (loss, rows) in validations.items():
        if loss is not None and math.isfinite(loss):
            best[rows] = min(best.get(rows, (loss, step)), (loss, step))
    if section.keep_best:
        keep |= {step for _, step in best.values()}
    return keep


def prune_checkpoints(checkpoints: Path, published: int, plan: Plan, section: CheckpointSection) -> list[str]:
    """Delete superseded checkpoints up to step `published`; later ones failed verification and stay.

    Returns a warning for each that cannot be deleted.
    """
    validations: dict[int, Validation] = {}
    for step in list_checkpoint_steps(checkpoints):
        folder = step_folder(checkpoints, step)
        if step <= published and folder.is_dir():  # a file of that name is none of ours
            manifest = read_manifest(folder)
            validations[step] = Validation(None, 0)
            if isinstance(manifest, Manifest):
                validations[step] = Validation(manifest.validation_loss, manifest.validation_rows)
    superseded = sorted(validations.keys() - steps_to_keep(validations, plan, section))
    return _delete_all(delete_checkpoint, [step_folder(checkpoints, step) for step in superseded])


def delete_leftovers(checkpoints: Path) -> list[str]:
    """Delete what a crash, or a signal, left half done. One process calls this, while nobody saves.

    Returns a warning for each that cannot be deleted.
    """
    return _delete_all(delete_path, sorted(checkpoints.glob("step-*.tmp")))


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, renamed to .tmp before, so that a crash midway leaves none that is half there.

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


def _delete_all(delete: Callable[[Path], None], paths: Iterable[Path]) -> list[str]:
    """Returns a warning for each that cannot be deleted."""
    warnings: list[str] = []
    for path in paths:
        try:
            delete(path)
        except OSError as error:  # nothing is lost by it but room on the disk
            reason = files.describe_error(error)
            warnings.append(f"WARNING: {path} is left over and could not be deleted ({reason})")
    return warnings
