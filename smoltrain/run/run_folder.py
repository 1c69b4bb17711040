"""A run's folder: config.yaml with a record of every start, and whether this start may go on with it."""

import datetime
import math
import re
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltrain import files
from smoltrain.checkpoint.identity import (
    ConfigDifference,
    ForbiddenChange,
    RunIdentity,
    check_checkpoint_identity,
    find_config_differences,
    find_forbidden_changes,
    format_differences,
    identity_of_run,
    is_announced,
)
from smoltrain.config.config_file import CONFIG_FILE, config_digest_line, find_config_damage, read_provenance
from smoltrain.config.load import cut_micro_batch, read_run_config, redacted_config
from smoltrain.config.schema import Config
from smoltrain.config.yaml_text import dump_yaml
from smoltrain.errors import Problem, UserError, format_value

if TYPE_CHECKING:
    from smoltrain.checkpoint.manifest import Manifest

SAMPLES_FILE = "samples.jsonl"
SPIKES_FILE = "spikes.jsonl"
MAX_STARTS = 200  # that provenance keeps: the first one and the newest ones
WEIGHTLESS_KEYS = {"model.dropout", "model.attention_dropout", "model.initializer_range"}  # weights fit either way
PACKAGES = ("torch", "deepspeed", "tokenizers", "wandb", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: its path, the facts of its first start, and what this start changes."""

    path: Path
    rows_per_step: int
    wandb_id: str
    identity: RunIdentity  # for the manifests of its checkpoints
    changes: tuple[str, ...] = ()  # of the config since the last start, as far as they may move a number


@dataclass(frozen=True)
class PastRun:
    """What a start is held to: the run's own config.yaml, or that of the ancestor whose checkpoint it begins with."""

    path: Path  # of that config.yaml
    provenance: dict[str, Any]
    identity: RunIdentity
    differences: list[ConfigDifference] | None  # to the config of this start; None where config.yaml was lost


@dataclass(frozen=True)
class RunRecord:
    """What a start that may go on will write: provenance for config.yaml, and what to tell of changes."""

    provenance: dict[str, Any]  # rows_per_step, run_id, wandb_id and one entry per start
    changes: tuple[str, ...]  # as in RunFolder


def find_rows_per_step(
    config: Config, world_size: int, ancestor: Path | None = None, manifest: "Manifest | None" = None
) -> int:
    """Rows of a step over all ranks: as the run, or its ancestor, began; those of the config for one that begins now.

    Errors: UserError for a config.yaml that cannot be read.
    """
    past = _read_past(config, ancestor, manifest)
    return past.identity["rows_per_step"] if past else config.batch.rows(world_size)


def make_run_record(
    config: Config, world_size: int, done: int, ancestor: Path | None = None, manifest: "Manifest | None" = None,
    asked: Mapping[str, float] | None = None,
) -> RunRecord:  # fmt: skip
    """Check whether a run may go on after `done` steps; what this start will write then. Nothing is written.

    The config's phases are in steps; `asked` are the keys, with values, that say it in tokens or epochs.
    `manifest` is that of the checkpoint to go on from, which tells of its run. A new run that goes on from an
    `ancestor`, another run's folder, is held to that one's identity and past plan. Where config.yaml was lost, the
    checkpoint alone is what a run is held to.
    Errors: UserError showing every difference when the folder belongs to another model, tokenizer, data or past plan,
    or when config.yaml does not agree with the checkpoint.
    """
    past = _read_past(config, ancestor, manifest)
    _check_against_past(config, world_size, done, past, manifest)
    provenance = _build_provenance(config, world_size, done, past, ancestor, asked or {})
    return RunRecord(provenance, _describe_changes(config.run_folder / CONFIG_FILE, past))


def write_run_folder(config: Config, world_size: int, record: RunRecord) -> RunFolder:
    """Create or re-enter the folder: config.yaml then holds this start's config and provenance. Checks nothing again.

    Errors: those of `accumulation_steps`; nothing has been written then.
    """
    rows = record.provenance["rows_per_step"]
    accumulation_steps(config, rows, world_size)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    text = dump_yaml(redacted_config(config) | {"provenance": record.provenance})
    files.write_text_file(config.run_folder / CONFIG_FILE, text + config_digest_line(text))
    own = identity_of_run(config, record.provenance)
    return RunFolder(config.run_folder, rows, record.provenance["wandb_id"], own, record.changes)


def _read_past(config: Config, ancestor: Path | None, manifest: "Manifest | None") -> PastRun | None:
    """What a start is held to; None for a run that begins."""
    path = (ancestor or config.run_folder) / CONFIG_FILE
    if path.exists():
        old = read_run_config(path)
        provenance = read_provenance(path)
        identity = identity_of_run(old, provenance)
        return PastRun(path, provenance, identity, find_config_differences(old, config))
    if manifest:
        provenance = {"run_id": manifest.identity["run_id"], "wandb_id": manifest.wandb_id, "starts": []}
        return PastRun(path, provenance, manifest.identity, differences=None)
    return None


def _check_against_past(
    config: Config, world_size: int, done: int, past: PastRun | None, manifest: "Manifest | None"
) -> None:
    """Errors: UserError, as `make_run_record`."""
    if past is None:
        return
    if manifest and past.differences is not None:
        check_checkpoint_identity(manifest.identity, manifest.step, past.identity, past.path)
    changes = find_forbidden_changes(past.identity, config, done, world_size)
    if changes:
        raise UserError(_describe_forbidden_changes(changes, config, done, past.path.parent))


def _describe_forbidden_changes(changes: list[ForbiddenChange], config: Config, done: int, folder: Path) -> Problem:
    """One sentence: which keys differ from those of the run in `folder`, and the two ways out."""
    seen: list[str] = []
    for key, before, now, step in changes:
        since = "" if step is None else f" (from step {step} on)"
        seen.append(f"{key}: {_format_setting(before)} in the run, {_format_setting(now)} asked{since}")
    keys = {change.key for change in changes} - WEIGHTLESS_KEYS
    trains_another_bpe = config.tokenizer.name == "bpe" and any(key.startswith("data.") for key in keys)
    weights_fit = not (trains_another_bpe or any(key.startswith(("model.", "tokenizer.")) for key in keys))
    if folder != config.run_folder:
        way_out = "init.load=weights, which takes its weights alone" if weights_fit else "another init.from"
    else:
        way_out = f"another run.name; {folder} stays as it is"
        if weights_fit and done:
            way_out = f"another run.name (init.from={folder} begins with the weights of this one)"
    want = f"the run's values: {done} steps were trained with them" if done else "the run's values"
    change = f"them back, or choose {way_out}"
    return Problem("the config differs from the run's own", "; ".join(seen), want, change)


def _format_setting(value: Any) -> str:
    """A value as a recipe has it: null, cosine, 4e-4."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_format_setting, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[\w./*-]+", value):
        return value
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.15e}".split("e")
        return f"{float(mantissa):.12g}e{int(exponent)}"
    return format_value(value)


def _build_provenance(
    config: Config, world_size: int, done: int, past: PastRun | None, ancestor: Path | None, asked: Mapping[str, float]
) -> dict[str, Any]:
    """What config.yaml will say of the run's starts, this one included. Errors: those of `_read_own_provenance`."""
    start: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "from_step": done,
        "ranks": world_size,
        "git_commit": find_git_commit(Path(__file__).parent),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    if asked:
        start["asked"] = dict(asked)
    if past and past.differences is not None:
        start["changes"] = format_differences(past.differences)
    elif past:
        start["lost"] = f"{CONFIG_FILE}, before this start"
    rows = past.identity["rows_per_step"] if past else config.batch.rows(world_size)
    own = past.provenance if past else None
    if past and ancestor:
        start["from_run"] = past.identity["run_id"]
        own = _read_own_provenance(config, past)
    if own is None:
        ids = {"run_id": secrets.token_hex(8), "wandb_id": secrets.token_hex(4)}
        return {"rows_per_step": rows, **ids, "starts": [start]}
    first, *others = [*own["starts"], start]
    return own | {"rows_per_step": rows, "starts": [first, *others[1 - MAX_STARTS :]]}


def _read_own_provenance(config: Config, ancestor: PastRun) -> dict[str, Any] | None:
    """That of a run which begins with its ancestor once more, as it ended before a checkpoint of its own.

    None where it begins for the first time. Errors: UserError if it began with something else, whose data it has.
    """
    path = config.run_folder / CONFIG_FILE
    if not path.exists():
        return None
    provenance = read_provenance(path)
    began_with = provenance["starts"][-1].get("from_run") if provenance["starts"] else None
    if began_with != ancestor.identity["run_id"]:
        saw = f"run_id {ancestor.identity['run_id']} of {ancestor.path.parent}"
        want = f"run_id {began_with}, as in {path}" if began_with else f"what {path} says of its first start"
        change = f"init.from, or run.name; without {config.run_folder} the run begins with this one"
        raise UserError(Problem("the run, which has no checkpoint yet, began otherwise", saw, want, change))
    return provenance


def _describe_changes(path: Path, past: PastRun | None) -> tuple[str, ...]:
    """What the console says of changes since the last start; `path` is that of the run's own config.yaml."""
    if past is None:
        return ()
    if past.differences is None:
        return (f"{path} was gone; it is written anew, held to what the checkpoint says of its run",)
    damage = find_config_damage(past.path.parent)
    announced = [difference for difference in past.differences if is_announced(difference.key)]
    return (*([damage] if damage else []), *format_differences(announced))


def accumulation_steps(config: Config, rows_per_step: int, world_size: int) -> int:
    """Micro-batches per step and rank, so that every world trains on the same rows per step.

    Errors: UserError naming the worlds that fit.
    """
    accumulation = _divide_rows(config, rows_per_step, world_size)
    if accumulation is not None:
        return accumulation
    micro_batch = config.batch.micro_batch_rows
    small = [n for n in range(1, math.isqrt(rows_per_step) + 1) if rows_per_step % n == 0]
    divisors = sorted({*small, *(rows_per_step // n for n in small)})
    fitting = [str(n) for n in divisors if _divide_rows(config, rows_per_step, n)]
    want = f"one of {', '.join(fitting)} ranks" if fitting else f"a micro-batch that divides {rows_per_step}"
    what = f"{rows_per_step} rows per step do not divide evenly"
    saw = f"{world_size} ranks x micro_batch {micro_batch}"
    raise UserError(Problem(what, saw, want, "batch.micro_batch, or the number of ranks"))


def choose_training_ranks(config: Config, rows_per_step: int, num_ranks: int, num_streams: int | None = None) -> int:
    """The most of these ranks among which a step's rows divide evenly, and a run's streams, if it has any.

    All of them where no number fits: then `accumulation_steps` says what would.
    """
    for size in range(num_ranks, 0, -1):
        if _divide_rows(config, rows_per_step, size) and (num_streams or size) % size == 0:
            return size
    return num_ranks


def describe_idle_ranks(rows_per_step: int, num_training: int, num_ranks: int, num_streams: int | None = None) -> str:
    """A warning for whoever has started more ranks than train; with what would let all train, if something would."""
    idle = num_ranks - num_training
    what, advice = f"{rows_per_step} rows per step do not divide evenly among {num_ranks} ranks", ""
    if rows_per_step % num_ranks == 0:
        share = rows_per_step // num_ranks
        if num_streams and num_streams % num_ranks:
            what = f"{num_streams} streams do not divide evenly among {num_ranks} ranks"
        else:
            what = f"the {share} rows of each of {num_ranks} ranks are no whole number of micro-batches"
            advice = f"; with a batch.micro_batch that divides {share} all train"
    return (
        f"WARNING: {what}: {num_training} train{'s' * (num_training == 1)}, {idle} {'is' if idle == 1 else 'are'} "
        f"idle{advice}"
    )


def _divide_rows(config: Config, rows_per_step: int, world_size: int) -> int | None:
    """Micro-batches per step and rank; None where the rows do not divide evenly."""
    micro_batch = cut_micro_batch(config, rows_per_step, world_size).batch.micro_batch_rows
    accumulation, rest = divmod(rows_per_step, micro_batch * world_size)
    return None if rest else accumulation


def find_git_commit(folder: Path) -> str:
    """The commit of the checkout that these sources are part of, with '+' if it has local changes; else 'unknown'.

    An environment may lie inside somebody else's repository, which does not track what is installed there.
    """

    def git(*words: str) -> str:
        # `status` writes down what it has found, under a lock that would stay if this process were killed meanwhile.
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        is_tracked = bool(git("ls-files", "."))
        commit = git("rev-parse", "HEAD")
        has_changes = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    if not is_tracked:
        return "unknown"
    return f"{commit}{'+' if has_changes else ''}"
