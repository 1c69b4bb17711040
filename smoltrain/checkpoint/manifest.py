"""manifest.json: what a checkpoint says of itself, whether its files are that, and the newest one that verifies."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from smoltrain import files
from smoltrain.checkpoint.identity import RunIdentity
from smoltrain.errors import Problem, UserError

MANIFEST_FORMAT = 4
READABLE_FORMATS = (3, 4)  # in 3 DeepSpeed's files held the weights a second time
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
DIGEST_KEY = "manifest_sha256"  # in manifest.json: of everything else in it
STEP_PREFIX = "step-"
MODEL_STATES_SUFFIX = "model_states.pt"  # ends the names of DeepSpeed's files about the model
SHARD_NAME = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
RNG_STATE_NAME = re.compile(r"^rank-(\d+)\.pt$")
LAST_SAVED_FILE = "saved.json"  # beside checkpoints/: the newest step that was published


class FileRecord(TypedDict):
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Manifest:
    """Where a run stood, and what its files are."""

    format: int
    step: int
    phase: str
    world_size: int
    zero_stage: int
    precision: str
    loader: dict[str, Any]  # rows consumed by the optimizer, and the ledger
    skipped_updates: int
    wandb_id: str
    identity: RunIdentity  # of the run, to which its config.yaml is held
    validation_loss: float | None  # nats per token, of the evaluation at this very step; None if there was none
    validation_rows: int  # evaluate.rows then
    files: dict[str, FileRecord]  # by relative name


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return checkpoints / f"{STEP_PREFIX}{step:08d}"


def list_checkpoint_steps(checkpoints: Path) -> list[int]:
    """The steps that have a published checkpoint, oldest first. Errors: UserError if the folder cannot be read."""
    what = "the checkpoints cannot be looked at"
    try:
        names = [name.removeprefix(STEP_PREFIX) for name in os.listdir(checkpoints) if name.startswith(STEP_PREFIX)]  # noqa: PTH208
    except FileNotFoundError as error:
        if checkpoints.is_symlink():  # to a disk that is not mounted
            want = "a link to a folder that is there"
            raise UserError(Problem(what, str(error), want, str(checkpoints))) from None
        return []
    except OSError as error:  # Path.glob would find nothing, and the run would begin from scratch
        want = "a folder that this user may read"
        raise UserError(Problem(what, str(error), want, str(checkpoints))) from None
    return sorted(int(name) for name in names if re.fullmatch("[0-9]{8,}", name))


def write_last_saved_step(checkpoints: Path, step: int) -> None:
    """Write down, outside of the folder of checkpoints, that one of this step is in it."""
    files.write_json_file(checkpoints.parent / LAST_SAVED_FILE, {"step": step})


def read_last_saved_step(run: Path) -> int:
    """The newest step that the run published a checkpoint of; 0 if there never was one, 1 if nobody can say which."""
    path = run / LAST_SAVED_FILE
    if not path.exists():
        return 0
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"] if path.is_file() else 1
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 1  # it was written, whatever it said
    return step if type(step) is int and step > 0 else 1


def find_newest_valid_checkpoint(
    checkpoints: Path, say: Callable[[str], None], *, trains: bool = False
) -> Manifest | None:
    """The manifest of the newest checkpoint whose files are all as they were written; None if there is no checkpoint.

    To go on training (`trains`) takes more files than to use the weights. Says which newer ones were passed over and
    why. Errors: UserError when checkpoints exist but none verifies: a run never starts from scratch without being told
    to.
    """
    reasons: list[str] = []
    for step in reversed(list_checkpoint_steps(checkpoints)):
        folder = step_folder(checkpoints, step)
        verified = verify_checkpoint(folder)
        if isinstance(verified, Manifest):
            faults = [*list_missing_states(verified), *list_stray_files(folder, verified)] if trains else []
            if not faults:
                return verified
            reason = f"{folder} cannot be trained on: {', '.join(faults)}"
        else:
            reason = verified
        reasons.append(reason)
        say(f"checkpoint of step {step} is passed over: {reason}")
    if reasons:
        want = "one that verifies; mend it, or delete the folder to start from scratch"
        raise UserError(Problem("no checkpoint of this run is whole", "; ".join(reasons), want, str(checkpoints)))
    return None


def describe_last_checkpoint(checkpoints: Path) -> str:
    """One sentence that names the newest valid checkpoint, for a run that must stop."""
    try:
        found = find_newest_valid_checkpoint(checkpoints, lambda _: None)
    except UserError:
        found = None
    return f"the last checkpoint, of step {found.step}, is intact" if found else "there is no checkpoint before it"


def verify_checkpoint(checkpoint: Path) -> Manifest | str:
    """The manifest if every file has the size and SHA-256 it names, else what is wrong with which file."""
    manifest = read_manifest(checkpoint)
    if isinstance(manifest, str):
        return manifest
    for name, record in manifest.files.items():
        try:
            path = files.resolve_inside(checkpoint, name, str(checkpoint / MANIFEST_FILE))
        except UserError as error:
            return str(error)
        try:
            if (size := files.stat_regular_file(path).st_size) != record["bytes"]:
                return f"{path} has {size} bytes, not {record['bytes']}"
            if files.file_sha256(path) != record["sha256"]:
                return f"{path} is not what was written (SHA-256 differs)"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return manifest


def read_manifest(checkpoint: Path) -> Manifest | str:
    """The manifest alone, its files unread, or what is wrong with it."""
    path = checkpoint / MANIFEST_FILE
    try:
        tree = json.loads(files.read_text_file(path))
        if tree.get("format") not in READABLE_FORMATS:
            return f"{path} has format {tree.get('format')}, not {' or '.join(map(str, READABLE_FORMATS))}"
        if tree != files.seal_json(tree, DIGEST_KEY):
            return f"{path} is not what was written (its own digest differs)"
        del tree[DIGEST_KEY]
        manifest = Manifest(**tree)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{path} cannot be read ({'.'.join(map(str, first['loc']))}: {first['msg']})"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{path} cannot be read ({error})"
    if WEIGHTS_FILE not in manifest.files:
        return f"{path} names no {WEIGHTS_FILE}, without which a checkpoint is none"
    name = checkpoint.resolve().name
    if name.startswith(STEP_PREFIX) and name != step_folder(checkpoint, manifest.step).name:
        return f"{path} is that of step {manifest.step}"
    return manifest


class TrainingFiles(NamedTuple):
    """Names of a checkpoint's files that only training reads."""

    modules: list[str]  # what DeepSpeed notes of the model, without its weights
    shards: list[tuple[str, int]]  # of the optimizer state, with their ranks
    rng_states: list[tuple[str, int]]  # random number generators, with their ranks


def list_training_files(manifest: Manifest) -> TrainingFiles:
    """Sorted by name."""
    found = TrainingFiles([], [], [])
    for name in sorted(manifest.files):
        shard = SHARD_NAME.search(name)
        rng_state = RNG_STATE_NAME.match(name)
        if shard:
            found.shards.append((name, int(shard[1])))
        elif rng_state:
            found.rng_states.append((name, int(rng_state[1])))
        elif name.endswith(MODEL_STATES_SUFFIX):
            found.modules.append(name)
    return found


def list_missing_states(manifest: Manifest) -> list[str]:
    """In words, the states that training needs to go on from a checkpoint and that its manifest does not name."""
    training = list_training_files(manifest)
    world = manifest.world_size
    expected = (
        ("random states", [rank for _, rank in training.rng_states], world),
        ("optimizer states", [rank for _, rank in training.shards], world if manifest.zero_stage else 0),
        ("model states", list(range(len(training.modules))), world if manifest.zero_stage == 3 else 1),
    )
    return [
        f"it has the {what} of {len(ranks)} ranks, not of {num}"
        for what, ranks, num in expected
        if sorted(ranks) != list(range(num))
    ]


def list_stray_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    """In words, the .pt files in a checkpoint that its manifest does not name, so that nobody hashed them.

    DeepSpeed finds its files by how their names end.
    """
    found = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.pt")}
    return [f"{name} is no file of this checkpoint" for name in sorted(found - set(manifest.files))]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, sealed with its own digest; it and the folder's names are on the disk afterwards."""
    files.write_json_file(folder / MANIFEST_FILE, files.seal_json(asdict(manifest), DIGEST_KEY))
