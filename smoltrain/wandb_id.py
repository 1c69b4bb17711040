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
from smoltrain.plan import Plan, first_difference
from smoltrain.runfolder import RunFolder
from smoltrain.schema import Config, PhaseSection

FILE = "wandb.json"
UNDONE = "metrics.undone.jsonl"  # lines of steps that were done again, after a kill or a rewind
SHAPES = ("optimizer", "packing")  # sections that every step depends on, beside the phases


@dataclass(frozen=True)
class Identity:
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
        files.write_json(folder / FILE, kept)


def choose(config: Config, folder: RunFolder, first_step: int) -> Identity:
    """The id for a start that goes on after `first_step`, and the last step that W&B has been given under it."""
    here, asked = folder.path.resolve(), config.track.wandb_id
    plan = _plan(config)
    fresh = Identity(asked or folder.wandb_id, str(here), plan, asked, undone=_num_undone(here))
    before = read(here)
    if before is None and not asked and (here / "wandb").is_dir():  # written before there was a wandb.json
        return replace(fresh, through=_last(here, first_step, 0), undone=0)
    if before is None:
        return fresh
    earlier = (*before.earlier, before.id)
    if asked and asked != before.asked:
        return replace(fresh, earlier=earlier)
    if not asked and _is_copy(here, before):
        why = f"an id of its own: this folder is a copy of {before.folder}"
        return replace(fresh, id=secrets.token_hex(4), why=why)
    through = _last(here, max(before.through, first_step), before.undone) if before.open else before.through
    change = _first_change(before.plan, config, first_step)
    if change is not None and change <= through:
        why = f"a new id: steps {change} to {through} of {before.id} are of another plan"
        return another(replace(before, folder=str(here), plan=plan), here, why)
    return replace(before, folder=str(here), plan=plan, through=through)


def another(before: Identity, folder: Path, why: str) -> Identity:
    """The next id of the same folder, of which W&B has nothing yet."""
    earlier = (*before.earlier, before.id)
    fresh = replace(before, id=_next(before.id), earlier=earlier, through=0, open=False, why=why)
    return replace(fresh, undone=_num_undone(folder))


def told_rows(folder: Path, identity: Identity) -> dict[int, str]:
    """The digest of all rows up to each step that was told under this id and will be done again."""
    rows: dict[int, str] = {}
    for line in _undone(folder, identity.undone):
        if digest := line.get("data/ledger"):
            rows.setdefault(int(line["step"]), digest)  # the first time is what W&B keeps
    return rows


def read(folder: Path) -> Identity | None:
    """What a run's folder remembers, None if that is nothing that can be read."""
    try:
        return Identity(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _plan(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return {key: tree[key] for key in ("phases", *SHAPES)}


def _is_copy(here: Path, before: Identity) -> bool:
    """Whether the folder that it was before is still there, and writes to the same run of W&B, or once did."""
    there = Path(before.folder)
    if there == here or (other := read(there)) is None:
        return False
    return before.id in (other.id, *other.earlier) and not there.samefile(here)


def _first_change(was: dict[str, Any], config: Config, after: int) -> int | None:
    """The first step after `after` that is trained otherwise than W&B has been told, None if there is none."""
    now = _plan(config)
    if any(was.get(key) != now[key] for key in SHAPES):
        return after + 1
    try:
        past = Plan(tuple(PhaseSection.model_validate(phase) for phase in was["phases"]))
    except (KeyError, TypeError, ValueError):
        return after + 1
    return first_difference(past, Plan(config.phases), after)


def _last(folder: Path, least: int, skip: int) -> int:
    """The last step that was logged, at least `least`."""
    return max([least, *(told["step"] for told in _undone(folder, skip))])


def _undone(folder: Path, skip: int) -> list[dict[str, Any]]:
    """What metrics.undone.jsonl tells of steps, behind so many lines; what is damaged there tells nothing."""
    return [line.value for line in files.lines(folder / UNDONE) if line.number > skip and not line.fault]


def _num_undone(folder: Path) -> int:
    path = folder / UNDONE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _next(name: str) -> str:
    """ID-2 after ID, ID-3 after ID-2."""
    found = re.fullmatch(r"(.+)-(\d+)", name)
    return f"{found[1]}-{int(found[2]) + 1}" if found else f"{name}-2"
