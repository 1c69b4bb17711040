"""Which run of W&B a run folder writes to: the same one at every start, another one for a copy or another past.

The folder's wandb.json remembers the run's id, where the folder lay, and the plan and the steps that W&B was given.
The id is W&B's alone: what names the run in checkpoints and exports stays `wandb_id` of its provenance.
"""

import json
import re
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.older_keys import update_sections
from smoltrain.config.schema import Config
from smoltrain.run.run_folder import RunFolder
from smoltrain.schedule import Plan, first_differing_step, plan_from_phases

WANDB_FILE = "wandb.json"
UNDONE_METRICS_FILE = "metrics.undone.jsonl"  # lines of steps that were done again, after a kill or a rewind
STEP_SECTIONS = ("optimizer", "packing")  # sections that every step depends on, beside the phases


@dataclass(frozen=True)
class WandbIdentity:
    """What wandb.json holds: its keys are these names."""

    id: str
    folder: str  # where the run's folder lay, absolute
    plan: dict[str, Any]  # sections of the config that say how each step is trained
    asked: str | None = None  # the id that somebody asked for, from which this one may have been derived
    through: int = 0  # the last step that W&B was given
    open: bool = False  # a process gives it more; one that was killed leaves this behind
    undone: int = 0  # lines of metrics.undone.jsonl that are of earlier ids
    earlier: tuple[str, ...] = ()  # ids that this folder has written to before
    best_model_loss: float | None = None  # the lowest validation loss of a model that W&B was given
    why: str | None = field(default=None, compare=False)  # a new id was chosen, for the console; not kept

    def write(self, folder: Path) -> None:
        """Keep it. Errors: OSError."""
        kept = asdict(self)
        del kept["why"]
        files.write_json_file(folder / WANDB_FILE, kept)


def choose_wandb_identity(config: Config, folder: RunFolder, first_step: int) -> WandbIdentity:
    """The id for a start that goes on after `first_step`, and the last step that W&B has been given under it."""
    here = folder.path.resolve()
    asked = config.track.wandb_id
    plan = _plan_sections(config)
    fresh = WandbIdentity(asked or folder.wandb_id, str(here), plan, asked, undone=_count_undone_lines(here))
    before = read_wandb_identity(here)
    if before is None:
        if not asked and (here / "wandb").is_dir():  # of a version without wandb.json: W&B was given what is logged
            return replace(fresh, through=_last_logged_step(here, first_step, 0), undone=0)
        return fresh
    # Somebody asks for another id than at the last start.
    if asked and asked != before.asked:
        return replace(fresh, earlier=(*before.earlier, before.id))
    # A copy would write into the original's curves.
    if not asked and _is_copied_folder(here, before):
        why = f"an id of its own: this folder is a copy of {before.folder}"
        return replace(fresh, id=secrets.token_hex(4), why=why)
    through = before.through
    if before.open:  # its process was killed, perhaps before it wrote down how far W&B was given the steps
        through = _last_logged_step(here, max(through, first_step), before.undone)
    # W&B takes back no step: one that it has and that is now trained otherwise needs a new run.
    change = _first_changed_step(before.plan, config, first_step)
    if change is not None and change <= through:
        why = f"a new id: steps {change} to {through} of {before.id} are of another plan"
        return next_wandb_identity(replace(before, folder=str(here), plan=plan), here, why)
    return replace(before, folder=str(here), plan=plan, through=through)


def next_wandb_identity(before: WandbIdentity, folder: Path, why: str) -> WandbIdentity:
    """The next id of the same folder, of which W&B has nothing yet."""
    earlier = (*before.earlier, before.id)
    fresh = replace(
        before, id=_increment_id(before.id), earlier=earlier, through=0, open=False, best_model_loss=None, why=why
    )
    return replace(fresh, undone=_count_undone_lines(folder))


def read_logged_digests(folder: Path, identity: WandbIdentity) -> dict[int, str]:
    """By step, the digest of all rows up to it: of steps that W&B has under this id and that are done again."""
    digests: dict[int, str] = {}
    for line in _read_undone_metrics(folder, identity.undone):
        if "data/ledger" in line:
            digests.setdefault(line["step"], line["data/ledger"])  # the first time is what W&B keeps
    return digests


def read_wandb_identity(folder: Path) -> WandbIdentity | None:
    """What a run's folder remembers; None if there is no wandb.json that can be read."""
    try:
        identity = WandbIdentity(**json.loads((folder / WANDB_FILE).read_text(encoding="utf-8")))
        update_sections(identity.plan)
        return identity
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _plan_sections(config: Config) -> dict[str, Any]:
    """The sections of a config that say how each step is trained."""
    tree = config.model_dump(mode="json")
    return {key: tree[key] for key in ("phases", *STEP_SECTIONS)}


def _is_copied_folder(here: Path, before: WandbIdentity) -> bool:
    """Whether the folder that `before` names is another one, still there, and writes to this run of W&B or once did."""
    there = Path(before.folder)
    other = read_wandb_identity(there)
    if there == here or other is None or there.samefile(here):
        return False
    return before.id in (other.id, *other.earlier)


def _first_changed_step(was: dict[str, Any], config: Config, after: int) -> int | None:
    """The first step after `after` that is trained otherwise than `was` says; None if there is none."""
    now = _plan_sections(config)
    if any(was.get(key) != now[key] for key in STEP_SECTIONS):
        return after + 1
    try:
        past = plan_from_phases(was["phases"])
    except (LookupError, TypeError, ValueError):  # it may be of another version
        return after + 1
    return first_differing_step(past, Plan(config.phases), after)


def _last_logged_step(folder: Path, least: int, skip: int) -> int:
    """The last step that was logged, at least `least`."""
    return max([least, *(line["step"] for line in _read_undone_metrics(folder, skip))])


def _read_undone_metrics(folder: Path, skip: int) -> list[dict[str, Any]]:
    """The sound lines of metrics.undone.jsonl, without the first `skip`."""
    lines = files.read_jsonl_lines(folder / UNDONE_METRICS_FILE)
    return [line.value for line in lines if line.number > skip and not line.fault]


def _count_undone_lines(folder: Path) -> int:
    path = folder / UNDONE_METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _increment_id(name: str) -> str:
    """ID-2 after ID, ID-3 after ID-2."""
    found = re.fullmatch(r"(.+)-(\d+)", name)
    return f"{found[1]}-{int(found[2]) + 1}" if found else f"{name}-2"
