"""Which run of W&B a run folder writes to: the same one at every start, another one for a copy or another past.

The folder's wandb.json remembers the run's id, where the folder lay, the plan that W&B saw and how far it was told.
It is W&B's alone: what names the run in checkpoints and exports stays `wandb_id` of its provenance.
"""

import json
import re
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.schema import Config, PhaseSection
from smoltrain.run.run_folder import RunFolder
from smoltrain.schedule import Plan, first_differing_step

WANDB_FILE = "wandb.json"
UNDONE_METRICS_FILE = "metrics.undone.jsonl"  # lines of steps that were done again, after a kill or a rewind
STEP_SECTIONS = ("optimizer", "packing")  # sections that every step depends on, beside the phases


@dataclass(frozen=True)
class WandbIdentity:
    """What wandb.json holds."""

    id: str
    folder: str  # where the run's folder lay, absolute
    plan: dict[str, Any]  # sections of the config that say how each step is trained
    asked: str | None = None  # the id that somebody asked for, from which this one may have been derived
    through: int = 0  # the last step that W&B was given
    open: bool = False  # a process gives it more; one that was killed leaves this behind
    undone: int = 0  # lines of metrics.undone.jsonl that are of earlier ids
    earlier: tuple[str, ...] = ()  # ids that this folder has written to before
    why: str = field(default="", compare=False)  # an id was chosen, for the console; not kept

    def write(self, folder: Path) -> None:
        """Keep it. Errors: OSError."""
        kept = asdict(self)
        del kept["why"]
        files.write_json_file(folder / WANDB_FILE, kept)


def choose_wandb_identity(config: Config, folder: RunFolder, first_step: int) -> WandbIdentity:
    """The id for a start that goes on after `first_step`, and the last step that W&B has been given under it."""
    here, asked = folder.path.resolve(), config.track.wandb_id
    plan = _plan_sections(config)
    fresh = WandbIdentity(asked or folder.wandb_id, str(here), plan, asked, undone=_count_undone_lines(here))
    before = read_wandb_identity(here)
    if before is None and not asked and (here / "wandb").is_dir():  # written before there was a wandb.json
        return replace(fresh, through=_last_logged_step(here, first_step, 0), undone=0)
    if before is None:
        return fresh
    earlier = (*before.earlier, before.id)
    if asked and asked != before.asked:
        return replace(fresh, earlier=earlier)
    if not asked and _is_copied_folder(here, before):
        why = f"an id of its own: this folder is a copy of {before.folder}"
        return replace(fresh, id=secrets.token_hex(4), why=why)
    through = _last_logged_step(here, max(before.through, first_step), before.undone) if before.open else before.through
    change = _first_changed_step(before.plan, config, first_step)
    if change is not None and change <= through:
        why = f"a new id: steps {change} to {through} of {before.id} are of another plan"
        return next_wandb_identity(replace(before, folder=str(here), plan=plan), here, why)
    return replace(before, folder=str(here), plan=plan, through=through)


def next_wandb_identity(before: WandbIdentity, folder: Path, why: str) -> WandbIdentity:
    """The next id of the same folder, of which W&B has nothing yet."""
    earlier = (*before.earlier, before.id)
    fresh = replace(before, id=_increment_id(before.id), earlier=earlier, through=0, open=False, why=why)
    return replace(fresh, undone=_count_undone_lines(folder))


def read_logged_digests(folder: Path, identity: WandbIdentity) -> dict[int, str]:
    """The digest of all rows up to each step that was told under this id and will be done again."""
    rows: dict[int, str] = {}
    for line in _read_undone_metrics(folder, identity.undone):
        if digest := line.get("data/ledger"):
            rows.setdefault(int(line["step"]), digest)  # the first time is what W&B keeps
    return rows


def read_wandb_identity(folder: Path) -> WandbIdentity | None:
    """What a run's folder remembers, None if that is nothing that can be read."""
    try:
        return WandbIdentity(**json.loads((folder / WANDB_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _plan_sections(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return {key: tree[key] for key in ("phases", *STEP_SECTIONS)}


def _is_copied_folder(here: Path, before: WandbIdentity) -> bool:
    """Whether the folder that it was before is still there, and writes to the same run of W&B, or once did."""
    there = Path(before.folder)
    if there == here or (other := read_wandb_identity(there)) is None:
        return False
    return before.id in (other.id, *other.earlier) and not there.samefile(here)


def _first_changed_step(was: dict[str, Any], config: Config, after: int) -> int | None:
    """The first step after `after` that is trained otherwise than W&B has been told, None if there is none."""
    now = _plan_sections(config)
    if any(was.get(key) != now[key] for key in STEP_SECTIONS):
        return after + 1
    try:
        past = Plan(tuple(PhaseSection.model_validate(phase) for phase in was["phases"]))
    except (KeyError, TypeError, ValueError):
        return after + 1
    return first_differing_step(past, Plan(config.phases), after)


def _last_logged_step(folder: Path, least: int, skip: int) -> int:
    """The last step that was logged, at least `least`."""
    return max([least, *(told["step"] for told in _read_undone_metrics(folder, skip))])


def _read_undone_metrics(folder: Path, skip: int) -> list[dict[str, Any]]:
    """What metrics.undone.jsonl tells of steps, behind so many lines; what is damaged there tells nothing."""
    return [
        line.value
        for line in files.read_jsonl_lines(folder / UNDONE_METRICS_FILE)
        if line.number > skip and not line.fault
    ]


def _count_undone_lines(folder: Path) -> int:
    path = folder / UNDONE_METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _increment_id(name: str) -> str:
    """ID-2 after ID, ID-3 after ID-2."""
    found = re.fullmatch(r"(.+)-(\d+)", name)
    return f"{found[1]}-{int(found[2]) + 1}" if found else f"{name}-2"
