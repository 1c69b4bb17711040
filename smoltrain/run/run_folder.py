"""A run's folder: config.yaml with a record of every start, and whether this start may go on with it."""

import datetime
import math
import secrets
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltrain import files
from smoltrain.checkpoint.identity import (
    RunIdentity,
    check_checkpoint_identity,
    find_config_differences,
    find_forbidden_changes,
    format_differences,
    is_announced,
    make_run_identity,
)
from smoltrain.config.config_file import CONFIG_FILE, config_digest_line, find_config_damage, read_provenance
from smoltrain.config.load import read_run_config, redacted_config
from smoltrain.config.schema import Config
from smoltrain.config.yaml_text import dump_yaml
from smoltrain.errors import Problem, UserError

if TYPE_CHECKING:
    from smoltrain.checkpoint.manifest import Manifest

SPIKES_FILE = "spikes.jsonl"
MAX_STARTS = 200  # that provenance keeps: the first one and the newest
PACKAGES = ("torch", "deepspeed", "tokenizers", "wandb", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: its path, and the facts that were settled at the first start."""

    path: Path
    rows_per_step: int
    wandb_id: str
    identity: RunIdentity | None = None  # for the manifests of its checkpoints
    changes: tuple[str, ...] = ()  # of the config since the last start, as far as they may move a number


def check_run_folder(
    config: Config, world_size: int, done: int, ancestor: Path | None = None, manifest: "Manifest | None" = None
) -> dict[str, Any]:
    """The provenance that this start would write: rows_per_step, run_id, wandb_id and one entry per start.

    `manifest` is that of the checkpoint to go on from, which tells of its run. A new run that goes on from an
    `ancestor`, another run's folder, is held to that one's identity and past plan. Where config.yaml was lost, the
    checkpoint alone is what a run is held to. Errors: UserError showing every difference when the folder belongs to
    another model, tokenizer, data or past plan, or when config.yaml does not agree with the checkpoint.
    """
    path = config.run_folder / CONFIG_FILE
    start: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "from_step": done,
        "ranks": world_size,
        "git_commit": _git_commit(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    fresh = {"run_id": secrets.token_hex(8), "wandb_id": secrets.token_hex(4)}
    before = path if path.exists() or not ancestor else ancestor / CONFIG_FILE
    change = f"{before.parent} belongs to another run: take back the change, or choose another run.name"
    if before.exists():
        old, provenance = read_run_config(before), read_provenance(before)
        was = make_run_identity(old, provenance["rows_per_step"], provenance["run_id"])
        if manifest:
            check_checkpoint_identity(manifest, before)
        start["changes"] = format_differences(find_config_differences(old, config))
    elif manifest:
        was, provenance = manifest.identity, {"wandb_id": manifest.wandb_id, "starts": []}
        provenance["run_id"] = was["run_id"]
        start["lost"] = f"{CONFIG_FILE}, before this start"
    else:
        return {"rows_per_step": config.batch.rows(world_size), **fresh, "starts": [start]}
    if problems := find_forbidden_changes(was, config, done, change):
        raise UserError(*problems)
    if before != path:
        return {"rows_per_step": was["rows_per_step"], **fresh, "starts": [start]}
    first, *others = [*provenance["starts"], start]
    return {**fresh, **provenance, "rows_per_step": was["rows_per_step"], "starts": [first, *others[1 - MAX_STARTS :]]}


def find_announced_changes(
    config: Config, ancestor: Path | None = None, manifest: "Manifest | None" = None
) -> tuple[str, ...]:
    """What to tell of how this start differs from the last one, as far as it may move a number; nothing is written."""
    path = config.run_folder / CONFIG_FILE
    before = path if path.exists() or not ancestor else ancestor / CONFIG_FILE
    if before.exists():
        differences = find_config_differences(read_run_config(before), config)
        announced = [difference for difference in differences if is_announced(difference[0])]
        return (*filter(None, [find_config_damage(before.parent)]), *format_differences(announced))
    if manifest:
        return (f"{path} was gone; it is written anew, held to what the checkpoint says of its run",)
    return ()


def write_run_folder(
    config: Config, world_size: int, provenance: dict[str, Any], changes: tuple[str, ...] = ()
) -> RunFolder:
    """Create or re-enter the folder: config.yaml then holds this start's config and what `check_run_folder` returned.

    Errors: those of `accumulation_steps`; nothing has been written then.
    """
    path = config.run_folder / CONFIG_FILE
    rows_per_step = provenance["rows_per_step"]
    accumulation_steps(config, rows_per_step, world_size)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    text = dump_yaml(redacted_config(config) | {"provenance": provenance})
    files.write_text_file(path, text + config_digest_line(text))
    identity = make_run_identity(config, rows_per_step, provenance["run_id"])
    return RunFolder(config.run_folder, rows_per_step, provenance["wandb_id"], identity, changes)


def enter_run_folder(
    config: Config, world_size: int, done: int, ancestor: Path | None = None, manifest: "Manifest | None" = None
) -> RunFolder:
    """Check and write in one: for those who have no start of their own to hand on.

    Errors: those of `check_run_folder` and `write_run_folder`; nothing has been written then.
    """
    provenance = check_run_folder(config, world_size, done, ancestor, manifest)
    return write_run_folder(config, world_size, provenance, find_announced_changes(config, ancestor, manifest))


def accumulation_steps(config: Config, rows_per_step: int, world_size: int) -> int:
    """Micro-batches per step and rank, so that every world trains on the same rows per step.

    Errors: UserError naming the worlds that fit.
    """
    micro = config.batch.micro_batch_rows
    if rows_per_step % (micro * world_size):
        whole = rows_per_step // micro if rows_per_step % micro == 0 else 0
        small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]
        fits = sorted({*small, *(whole // n for n in small)})
        want = f"one of {', '.join(map(str, fits))} ranks" if fits else f"a micro-batch that divides {rows_per_step}"
        saw = f"{world_size} ranks x micro_batch {micro}"
        what = f"{rows_per_step} rows per step do not divide evenly"
        raise UserError(Problem(what, saw, want, "batch.micro_batch, or the number of ranks"))
    return rows_per_step // (micro * world_size)


def _git_commit() -> str:
    """The commit of smoltrain's own checkout, with '+' if it has local changes; 'unknown' outside of git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
