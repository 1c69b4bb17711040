"""A run's folder and its identity: what a resume may change, what it may not, and a record of every start."""

import datetime
import errno
import secrets
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from smoltrain import config as config_module
from smoltrain import files
from smoltrain.errors import Problem, UserError
from smoltrain.plan import Plan
from smoltrain.schema import Config, SourceSection

# What the weights of the past depend on; changing any of it would make the run another run.
IDENTITY = ("model", "tokenizer", "data", "packing", "optimizer", "run.seed", "batch.sequence_length")
# What may change of these: the data themselves are compared by their fingerprint, wherever they lie now.
ELSEWHERE = ("path", "cache", "patience_s", "max_bad_records", "allow_changed", "mode", "streams")
FREE = tuple(f"data.{key}" for key in ELSEWHERE)
UNWRITABLE = {
    errno.EACCES: "a folder that this user may write",
    errno.EPERM: "a folder that this user may write",
    errno.EROFS: "a file system that is not read-only",
}
PACKAGES = ("torch", "deepspeed", "tokenizers", "wandb", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: its path, and the two facts that were settled at the first start."""

    path: Path
    rows_per_step: int
    wandb_id: str


def claim(config: Config, patience_s: float = 40.0) -> FileLock | None:
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
        if want := UNWRITABLE.get(error.errno or 0):
            raise UserError(Problem("the run cannot be written there", str(error), want, "run.folder")) from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some network file systems have none
            return None
        raise
    return lock


def check(config: Config, world_size: int, done: int, ancestor: Path | None = None) -> dict[str, Any]:
    """The provenance that this start would write: rows_per_step, wandb_id and one entry per start.

    A new run that goes on from an `ancestor`, another run's folder, is held to that one's identity and past plan.
    Errors: UserError showing every difference when the folder belongs to another model, tokenizer, data or past plan.
    """
    path = config.run_folder / "config.yaml"
    start: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "from_step": done,
        "ranks": world_size,
        "git_commit": _git_commit(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    if path.exists() or ancestor:
        before = path if path.exists() or not ancestor else ancestor / "config.yaml"
        old, provenance = config_module.read(before), provenance_of(before)
        if problems := _forbidden(old, config, done, before):
            raise UserError(*problems)
        start["changes"] = [f"{key}: {was!r} -> {now!r}" for key, was, now in differences(old, config)]
        if before == path:
            provenance["starts"].append(start)
            return provenance
        rows = provenance["rows_per_step"]
    else:
        rows = config.batch.rows(world_size)
    return {"rows_per_step": rows, "wandb_id": secrets.token_hex(4), "starts": [start]}


def enter(config: Config, world_size: int, done: int, ancestor: Path | None = None) -> RunFolder:
    """Create or re-enter the folder after `done` steps; config.yaml then holds this start's config and provenance.

    Errors: those of `check` and of `accumulation`; nothing has been written then.
    """
    provenance = check(config, world_size, done, ancestor)
    accumulation(config, provenance["rows_per_step"], world_size)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    tree = config.model_dump(mode="json") | {"provenance": provenance}
    files.write_text(config.run_folder / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return RunFolder(config.run_folder, provenance["rows_per_step"], provenance["wandb_id"])


def accumulation(config: Config, rows_per_step: int, world_size: int) -> int:
    """Micro-batches per step and rank, so that every world trains on the same rows per step.

    Errors: UserError naming the worlds that fit.
    """
    micro = config.batch.rows_at_once
    if rows_per_step % (micro * world_size):
        fits = [n for n in range(1, rows_per_step // micro + 1) if rows_per_step % (micro * n) == 0]
        want = f"one of {', '.join(map(str, fits))} ranks" if fits else f"a micro-batch that divides {rows_per_step}"
        saw = f"{world_size} ranks x micro_batch {micro}"
        what = f"{rows_per_step} rows per step do not divide evenly"
        raise UserError(Problem(what, saw, want, "batch.micro_batch, or the number of ranks"))
    return rows_per_step // (micro * world_size)


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two configs differ."""
    was, now = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [(key, was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)]


def provenance_of(path: Path) -> dict[str, Any]:
    """What a run's config.yaml says of its starts. Errors: UserError if the run did not write it."""
    provenance = yaml.safe_load(path.read_text(encoding="utf-8")).get("provenance")
    if not provenance:
        want = "the config.yaml that the run wrote itself"
        raise UserError(Problem("the run's config has no provenance", "none", want, str(path)))
    return provenance


def _forbidden(old: Config, new: Config, done: int, path: Path) -> list[Problem]:
    change = f"{path.parent} belongs to another run: take back the change, or choose another run.name"
    free = FREE + tuple(f"data.{key}" for key in SourceSection.model_fields if new.data.allow_changed)
    problems = [
        Problem(f"{key} differs from the run's own", repr(now), repr(was), change)
        for key, was, now in differences(old, new)
        if (any(key == fixed or key.startswith(fixed + ".") for fixed in IDENTITY) and key not in free)
        or key in ("batch.accumulation", "batch.rows_per_step")
    ]
    past, asked = Plan(old.phases), Plan(new.phases)
    if asked.last_step < done:
        return [*problems, Problem("the plan ends in the past", f"{asked.last_step} steps", f"{done} or more", change)]
    for step in range(1, done + 1):
        was, now = _at(past, step), _at(asked, step)
        if was != now:
            what = f"the plan changes step {step}, which is done"
            return [*problems, Problem(what, _words(now), _words(was), f"phases. {change}")]
    return problems


At = tuple[str, float, float, bool, dict[str, float] | None]


def _at(plan: Plan, step: int) -> At:
    phase, reset = plan.phase(step).name, plan.resets_optimizer(step)
    return phase, plan.lr(step), plan.weight_decay(step), reset, plan.mix(step)


def _words(at: At) -> str:
    name, lr, decay, reset, mix = at
    more = (", optimizer reset" if reset else "") + (f", mix {mix}" if mix else "")
    return f"phase {name}, lr {lr:g}, weight decay {decay:g}{more}"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}


def _git_commit() -> str:
    """The commit of smoltrain's own checkout, with '+' if it has local changes; 'unknown' outside of git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
