"""A run's folder: config.yaml with a record of every start, and whether this start may go on with it."""

import datetime
import errno
import hashlib
import math
import re
import secrets
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from smoltrain import files
from smoltrain.config.identity import (
    RunIdentity,
    find_config_differences,
    find_forbidden_changes,
    find_identity_mismatches,
    format_differences,
    is_announced,
    make_run_identity,
)
from smoltrain.config.load import read_run_config, redacted_config
from smoltrain.config.schema import Config
from smoltrain.config.yaml_text import dump_yaml, read_yaml
from smoltrain.errors import Problem, UserError, format_value

if TYPE_CHECKING:
    from smoltrain.checkpoint.manifest import Manifest

CONFIG_FILE = "config.yaml"
CONFIG_DIGEST_PREFIX = "# sha256 of the lines above: "  # the last line of config.yaml
MAX_STARTS = 200  # that provenance keeps: the first one and the newest
UNWRITABLE_ERRORS = {
    errno.EACCES: "a folder that this user may write",
    errno.EPERM: "a folder that this user may write",
    errno.EROFS: "a file system that is not read-only",
}
PACKAGES = ("torch", "deepspeed", "tokenizers", "wandb", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: its path, and the facts that were settled at the first start."""

    path: Path
    rows_per_step: int
    wandb_id: str
    identity: RunIdentity | None = None  # for the manifests of its checkpoints
    changes: tuple[str, ...] = ()  # of the config since the last start, as far as they may move a number


def lock_run_folder(config: Config, patience_s: float = 40.0) -> FileLock | None:
    """The right to write to a run's folder, which no two processes have; it ends with the process, however that ends.

    Waits a while for one that is leaving. Errors: UserError if another one keeps it. None where locks are unknown.
    """
    lock = FileLock(config.run.folder / f".{config.run.name}.lock")
    try:
        config.run.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience_s, poll_interval=0.2)
    except Timeout:
        what, want = "another process trains this run", "one at a time"
        raise UserError(Problem(what, str(lock.lock_file), want, "run.name, or end the other one")) from None
    except OSError as error:
        if want := UNWRITABLE_ERRORS.get(error.errno or 0):
            raise UserError(Problem("the run cannot be written there", str(error), want, "run.folder")) from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some network file systems have none
            return None
        raise
    return lock


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


def check_checkpoint_identity(manifest: "Manifest", path: Path) -> None:
    """Errors: UserError unless a checkpoint is its run's own, and says of it what the run's config.yaml does."""
    old, provenance = read_run_config(path), read_provenance(path)
    was = make_run_identity(old, provenance["rows_per_step"], provenance["run_id"])
    sealed, of_step = manifest.identity, f"the checkpoint of step {manifest.step}"
    if was["run_id"] != sealed["run_id"]:
        change = f"{path.parent / 'checkpoints'}; init.from and init.load=all go on from another run"
        what, saw = f"{of_step} is another run's", f"run_id {sealed['run_id']}"
        raise UserError(Problem(what, saw, f"{was['run_id']}, as in {path}", change))
    if wrong := find_identity_mismatches(was, sealed, manifest.step):
        change = f"{path}; without it, the next start is held to the checkpoint and writes it anew"
        what, saw = f"{path} does not agree with {of_step}", "; ".join(wrong)
        raise UserError(Problem(what, saw, "what the run wrote", change))


def enter_run_folder(
    config: Config, world_size: int, done: int, ancestor: Path | None = None, manifest: "Manifest | None" = None
) -> RunFolder:
    """Create or re-enter the folder after `done` steps; config.yaml then holds this start's config and provenance.

    Errors: those of `check` and of `accumulation`; nothing has been written then.
    """
    path = config.run_folder / CONFIG_FILE
    changes: list[str] = []
    provenance = check_run_folder(config, world_size, done, ancestor, manifest)
    rows = provenance["rows_per_step"]
    accumulation_steps(config, rows, world_size)
    if (before := path if path.exists() or not ancestor else ancestor / CONFIG_FILE).exists():
        told = [
            change for change in find_config_differences(read_run_config(before), config) if is_announced(change[0])
        ]
        changes = [*filter(None, [find_config_damage(before.parent)]), *format_differences(told)]
    elif manifest:
        changes = [f"{path} was gone; it is written anew, held to what the checkpoint says of its run"]
    config.run_folder.mkdir(parents=True, exist_ok=True)
    text = dump_yaml(redacted_config(config) | {"provenance": provenance})
    files.write_text_file(path, text + _config_digest_line(text))
    own = make_run_identity(config, rows, provenance["run_id"])
    return RunFolder(config.run_folder, rows, provenance["wandb_id"], own, tuple(changes))


def find_config_damage(folder: Path) -> str:
    """Whether config.yaml is as the run wrote it; '' if it is, or if it never had a digest, as in older versions."""
    path = folder / CONFIG_FILE
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{path} cannot be read ({files.describe_error(error)})"
    text, mark, _ = whole.rpartition(CONFIG_DIGEST_PREFIX)
    if (mark and whole == text + _config_digest_line(text)) or not re.search(r"[0-9a-f]{32}.*\s*\Z", whole):
        return ""
    return f"{path} is not what the run wrote (its last line is the digest of the others)"


def _config_digest_line(text: str) -> str:
    return f"{CONFIG_DIGEST_PREFIX}{hashlib.sha256(text.encode()).hexdigest()}\n"


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


def read_provenance(path: Path) -> dict[str, Any]:
    """What a run's config.yaml says of its starts. Errors: UserError if the run did not write it."""
    provenance = read_yaml(path, typed=True).get("provenance")
    want = "the config.yaml that the run wrote itself"
    if not provenance:
        raise UserError(Problem("the run's config has no provenance", "none", want, str(path)))
    about = {"run_id": "", "wandb_id": "", "starts": []} | (provenance if isinstance(provenance, dict) else {})
    rows, starts = about.get("rows_per_step"), about["starts"]
    kinds = [
        type(rows) is int and rows > 0,
        all(isinstance(about[key], str) for key in ("run_id", "wandb_id")),
        isinstance(starts, list) and all(isinstance(start, dict) for start in starts),
    ]
    if not all(kinds):
        raise UserError(Problem("the run's provenance is damaged", format_value(provenance), want, str(path)))
    return about


def _git_commit() -> str:
    """The commit of smoltrain's own checkout, with '+' if it has local changes; 'unknown' outside of git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
