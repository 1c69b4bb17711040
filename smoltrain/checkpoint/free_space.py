"""Room for a checkpoint on every disk that it is written to: with checkpoint.shared=off each machine has its own."""

import shutil
from pathlib import Path

from smoltrain.checkpoint.manifest import describe_last_checkpoint
from smoltrain.config.schema import CheckpointSection
from smoltrain.distributed.world import World
from smoltrain.errors import Problem, UserError

SPARE_BYTES = 64 << 20  # left free beside a checkpoint, for logs and W&B


def check_room(run: Path, needed: int, world: World, section: CheckpointSection) -> None:
    """Each disk that a checkpoint of `needed` bytes is written to has room for its part. Collective.

    Errors: UserError, the same on every rank, which names the machine.
    """

    def check_own_disk() -> None:
        if world.is_first:
            check_free_space(run, needed, name_machine(world))
        elif world.is_first_of_machine and is_private(world, section):
            check_free_space(run, needed // world.num_machines, name_machine(world))

    world.run_on_every_rank(check_own_disk)


def is_private(world: World, section: CheckpointSection) -> bool:
    """Whether each machine has a run folder of its own."""
    return section.shared == "off" and world.num_machines > 1


def name_machine(world: World) -> str:
    """This rank's, as ` on node7`, where there are several."""
    return f" on {world.hosts[world.rank]}" if world.num_machines > 1 else ""


def check_free_space(run: Path, needed: int, machine: str = "") -> None:
    """Errors: UserError if the disk of a run's folder cannot hold a checkpoint of `needed` bytes."""
    free = shutil.disk_usage(run).free
    if free < needed + SPARE_BYTES:
        checkpoints = run / "checkpoints"
        left = describe_last_checkpoint(checkpoints)
        want = f"{(needed + SPARE_BYTES) / 2**20:,.0f} MiB for the next checkpoint; {left}"
        raise UserError(
            Problem("the disk is nearly full", f"{free / 2**20:,.0f} MiB free{machine}", want, str(checkpoints))
        )
