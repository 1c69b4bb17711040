"""checkpoint.shared=off: each machine has a run folder of its own, and the first machine's is the one that counts.

Before a session opens, the other machines get what they lack of the tokens, the tokenizer and the checkpoint to go on
from. What they write of a checkpoint goes the other way (checkpoint/saver.py). So every later line of the program finds
its files where it would on a folder that all share; logs stay where they are written.
"""

from pathlib import Path

from smoltrain import files
from smoltrain.config.schema import Config
from smoltrain.data.tokens.load_prepared import read_run_index, run_tokens_folder
from smoltrain.distributed.file_transfer import copy_file
from smoltrain.distributed.world import World
from smoltrain.errors import Problem, UserError, mark_as_everyones


def spread_run_files(config: Config, checkpoint: Path | None, world: World) -> None:
    """Send what training reads to the first rank of each other machine. Collective.

    Errors: UserError, the same on every rank, where one cannot write it.
    """
    if config.checkpoint.shared != "off" or world.num_machines == 1:
        return
    digests = world.run_on_first_rank(lambda: _hash_files(_list_folders(config, checkpoint)), patient=True)
    is_receiver = world.is_first_of_machine and not world.is_first
    wanted = world.gather(_find_missing(digests) if is_receiver else [])
    own_fault: str | None = None
    for rank, paths in enumerate(wanted):
        for path in paths if world.rank in (0, rank) else []:
            fault = copy_file(world, Path(path), 0, rank)
            own_fault = own_fault or fault
    for rank, fault in enumerate(world.gather(own_fault)):
        if fault:
            what = f"{world.hosts[rank]} cannot write its copy of the run"
            raise mark_as_everyones(UserError(Problem(what, fault, "a folder with room for it", "run.folder")))


def find_unseen_ranks(config: Config, world: World) -> frozenset[int]:
    """The ranks whose logs this one cannot read."""
    if config.checkpoint.shared != "off":
        return frozenset()
    own = world.machines[world.rank]
    return frozenset(rank for rank, machine in enumerate(world.machines) if machine != own)


def _list_folders(config: Config, checkpoint: Path | None) -> list[Path]:
    """Folders that every rank reads. Errors: UserError for a damaged index of the data."""
    folders = [config.run_folder / "data", config.run_folder / "tokenizer"]
    tokens = run_tokens_folder(config, read_run_index(config))
    if tokens not in folders:
        folders.append(tokens)
    if checkpoint:
        folders.append(checkpoint)
    return folders


def _hash_files(folders: list[Path]) -> dict[str, str]:
    """SHA-256 of each file in these folders, by its path."""
    digests: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                digests[str(path.absolute())] = files.file_sha256(path)
    return digests


def _find_missing(digests: dict[str, str]) -> list[str]:
    """The files that are not there, or are others."""
    missing: list[str] = []
    for name, digest in digests.items():
        path = Path(name)
        if not path.is_file() or files.file_sha256(path) != digest:
            missing.append(name)
    return missing
