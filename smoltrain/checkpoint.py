"""Checkpoints that are whole or not there: written aside, hashed, named in a manifest, renamed, verified before use.

checkpoints/step-00000200/
    deepspeed/*.pt        DeepSpeed's shards: weights, fp32 masters, moments
    rank-00000.pt         one per rank: the state of its random number generators
    model.safetensors     the weights alone, in compute precision, for everything that is not training
    manifest.json         written last: step, world, loader state, size and SHA-256 of every other file
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from smoltrain import files
from smoltrain.data import Loader, merged
from smoltrain.dist import World
from smoltrain.errors import Problem, UserError
from smoltrain.plan import Plan

if TYPE_CHECKING:  # who only reads checkpoints needs no DeepSpeed
    from smoltrain.engine import Engine

FORMAT = 1
MANIFEST = "manifest.json"
SPARE_BYTES = 64 << 20  # left free beside a checkpoint, for logs and W&B


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    format: int
    step: int
    phase: str
    world_size: int
    zero_stage: int
    precision: str
    loader: dict[str, Any]  # rows consumed by the optimizer, and the ledger
    skipped_updates: int
    wandb_id: str
    files: dict[str, dict[str, Any]]  # relative name -> {"bytes", "sha256"}


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return checkpoints / f"step-{step:08d}"


def save(
    checkpoints: Path,
    step: int,
    engine: "Engine",
    loader: Loader,
    world: World,
    plan: Plan,
    keep_last: int,
    **facts: Any,
) -> Path:
    """Write the checkpoint of a step and prune old ones. Collective; a crash at any byte leaves the old ones valid.

    `facts` are the Manifest's remaining fields: precision, skipped_updates, wandb_id.
    Errors: UserError on every rank, before anything is written, when the disk cannot hold it.
    """
    final = folder_of(checkpoints, step)
    aside = final.with_name(final.name + ".tmp")
    world.on_first(lambda: _make_room(checkpoints, aside, engine.checkpoint_bytes()))
    engine.save_shards(aside)
    torch.save(_rng_state(), aside / f"rank-{world.rank:05d}.pt")
    weights = engine.weights(keep=world.is_first)
    if world.is_first:
        save_file(weights, aside / "model.safetensors")
    state = merged(world.gather(loader.state()))
    world.barrier()  # every rank's files stand
    mine = sorted(p for p in aside.rglob("*") if p.is_file())[world.rank :: world.size]
    records = world.gather({str(p.relative_to(aside)): _record(p) for p in mine})

    def publish() -> None:
        manifest = Manifest(
            format=FORMAT,
            step=step,
            phase=plan.phase(step).name,
            world_size=world.size,
            zero_stage=engine.stage,
            loader=state,
            files={name: record for part in records for name, record in part.items()},
            **facts,
        )
        files.sync(aside / "deepspeed")
        files.write_json(aside / MANIFEST, asdict(manifest))  # syncs the folder too
        if final.exists():  # the same step once more, after a rewind: the old one was invalid or is equal
            shutil.rmtree(final)
        aside.rename(final)
        files.sync(checkpoints)
        _prune(checkpoints, plan, keep_last)

    world.on_first(publish)
    return final


def restore(checkpoint: Path, manifest: Manifest, engine: "Engine", loader: Loader, world: World, *, seed: int) -> None:
    """Bring engine, loader and random numbers back to a verified checkpoint, whatever number of ranks wrote it.

    On as many ranks as wrote it every random number comes out as it would have. On another number nobody's generators
    fit, so each rank's begin afresh from (`seed` of the run, step, rank): the same again at every such start.
    Collective. Errors: UserError where the ZeRO stage, or the order of the optimizer state, is another.
    """
    if engine.stage != manifest.zero_stage and {engine.stage, manifest.zero_stage} != {1, 2}:
        what, saw = f"the checkpoint of step {manifest.step} is of another ZeRO stage", f"ZeRO-{engine.stage}"
        raise UserError(Problem(what, saw, f"ZeRO-{manifest.zero_stage}", "engine.ds_config"))
    engine.load_shards(checkpoint)
    loader.load_state(manifest.loader)
    if manifest.world_size == world.size:
        _set_rng_state(files.read_tensors(checkpoint / f"rank-{world.rank:05d}.pt"))
    else:
        digest = hashlib.sha256(f"{seed} {manifest.step} {world.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8]))


def newest_valid(checkpoints: Path, say: Callable[[str], None]) -> Manifest | None:
    """The manifest of the newest checkpoint whose files are all as they were written; None if there never was one.

    Says which newer ones were passed over and why. Errors: UserError when checkpoints exist but none verifies: a run
    never starts from scratch without being told to.
    """
    found = steps(checkpoints)
    wrong: list[str] = []
    for step in reversed(found):
        manifest = verify(folder_of(checkpoints, step))
        if isinstance(manifest, Manifest):
            return manifest
        wrong.append(manifest)
        say(f"checkpoint of step {step} is passed over: {manifest}")
    if found:
        want = "one that verifies; mend it, or delete the folder to start from scratch"
        raise UserError(Problem("no checkpoint of this run is whole", "; ".join(wrong), want, str(checkpoints)))
    return None


def verify(checkpoint: Path) -> Manifest | str:
    """The manifest if every file has the size and SHA-256 it names, else what is wrong with which file."""
    manifest = read_manifest(checkpoint)
    if isinstance(manifest, str):
        return manifest
    for name, record in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != record["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, not {record['bytes']}"
        if files.sha256(path) != record["sha256"]:
            return f"{path} is not what was written (SHA-256 differs)"
    return manifest


def read_manifest(checkpoint: Path) -> Manifest | str:
    """The manifest alone, its files unread, or what is wrong with it."""
    path = checkpoint / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        return f"{path} cannot be read ({error})"
    return manifest if manifest.format == FORMAT else f"{path} has format {manifest.format}, not {FORMAT}"


def steps(checkpoints: Path) -> list[int]:
    """The steps that have a published checkpoint, oldest first."""
    names = (p.name.removeprefix("step-") for p in checkpoints.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def _make_room(checkpoints: Path, aside: Path, needed: int) -> None:
    """Sweep what a crash left behind, make the folder, and refuse if the disk would overflow."""
    for leftover in checkpoints.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    checkpoints.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(checkpoints).free
    if free < needed + SPARE_BYTES:
        want = f"{(needed + SPARE_BYTES) / 2**20:,.0f} MiB for the next checkpoint; the last one is intact"
        raise UserError(Problem("the disk is nearly full", f"{free / 2**20:,.0f} MiB free", want, str(checkpoints)))
    aside.mkdir()


def _record(path: Path) -> dict[str, Any]:
    files.sync(path)
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _prune(checkpoints: Path, plan: Plan, keep_last: int) -> None:
    """Delete all but the newest `keep_last` and the ends of phases."""
    ends = {phase.last for phase in plan.phases}
    for step in steps(checkpoints)[:-keep_last]:
        if step not in ends:
            shutil.rmtree(folder_of(checkpoints, step))


def _rng_state() -> dict[str, Any]:
    """The generators that training draws from: dropout on the host and on this rank's GPU."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"host": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["host"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
