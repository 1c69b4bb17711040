"""Restores a verified checkpoint into engine, loader and random number generators; captures the generators' state."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smoltrain import files
from smoltrain.checkpoint.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest
from smoltrain.data.rows.loader import Loader
from smoltrain.distributed.world import World
from smoltrain.errors import Problem, UserError
from smoltrain.model.hf_weights import read_safetensors_file

if TYPE_CHECKING:  # who only reads checkpoints needs no DeepSpeed
    from smoltrain.engine.engine import Engine


def restore_checkpoint(
    checkpoint: Path, manifest: Manifest, engine: "Engine", loader: Loader, world: World, *, seed: int
) -> None:
    """Bring engine, loader and random numbers back to a verified checkpoint, whatever number of ranks wrote it.

    On as many ranks as wrote it, every random number comes out as it would have. On another number of ranks each rank's
    generators begin afresh from (`seed` of the run, step, rank): the same again at every such start.
    Collective. Errors: UserError where a rank does not see the folder, and those of engine.load_shards.
    """
    ranks_see_it = world.gather((checkpoint / MANIFEST_FILE).is_file())
    if not all(ranks_see_it):
        saw = f"no {checkpoint} on rank {ranks_see_it.index(False)}"
        want = "a file system that all nodes share"
        raise UserError(Problem("the checkpoint is not there for every rank", saw, want, "run.folder"))
    weights = world.run_on_every_rank(lambda: read_safetensors_file(checkpoint / WEIGHTS_FILE))
    engine.load_shards(checkpoint, manifest.zero_stage, weights)
    loader.load_state(manifest.loader)
    if manifest.world_size == world.size:
        state = world.run_on_every_rank(lambda: files.read_tensors(checkpoint / rng_file_name(world.rank)))
        _set_rng_state(state, world)
    else:
        digest = hashlib.sha256(f"{seed} {manifest.step} {world.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8]))


def rng_file_name(rank: int) -> str:
    """The name of the file with a rank's random number generators."""
    return f"rank-{rank:05d}.pt"


def capture_rng_state(world: World) -> dict[str, Any]:
    """The generators that training draws from: dropout on the host and on this rank's GPU.

    Of a rank that computes on a CPU no GPU is asked: that alone would take half a GiB of it.
    """
    cuda = torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None
    return {"host": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any], world: World) -> None:
    torch.set_rng_state(state["host"])
    if state["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)
