"""Do all machines see one and the same run folder? Asked before anything is written there.

Without one every machine would write its part of a checkpoint where no other can read it.
"""

import functools
import os
import secrets
from pathlib import Path

from smoltrain.checkpoint.written_files import find_lasting_fault
from smoltrain.config.schema import Config
from smoltrain.distributed.world import World
from smoltrain.errors import Problem, UserError, mark_as_everyones


def check_shared_folder(config: Config, world: World) -> None:
    """Rank 0 writes a mark into the folders of the run, and every rank reads it. Collective, on several machines.

    Errors: UserError, the same on every rank, which says who does not see what.
    """
    if world.num_machines == 1 or config.checkpoint.shared == "off":
        return
    who = find_unseen_folders([config.run.folder, config.run_folder, config.run_folder / "checkpoints"], world)
    if who:
        saw = "; ".join(f"{host} does not see {folder}" for host, folder in who.items())
        want = f"a folder that all machines share, at one path; {world.hosts[0]} has written into it"
        problem = Problem(
            "the machines do not share the run's folder",
            saw,
            want,
            "run.folder, what is mounted there, or checkpoint.shared",
        )
        raise mark_as_everyones(UserError(problem))


def find_unseen_folders(folders: list[Path], world: World) -> dict[str, str]:
    """The name of a machine -> the folder that rank 0's machine has and it does not see. Collective.

    Errors: UserError, the same on every rank, where rank 0 cannot write.
    """
    marks = world.run_on_first_rank(lambda: _write_marks(folders))
    try:
        looks = [functools.partial(_find_unseen, path, text) for path, text in marks.items()]
        unseen = world.gather(find_lasting_fault(looks))
    finally:
        for path in marks if world.is_first else ():
            path.unlink(missing_ok=True)
    who: dict[str, str] = {}
    for host, folder in zip(world.hosts, unseen, strict=True):
        if folder is not None:
            who[host] = folder
    return who


def _write_marks(folders: list[Path]) -> dict[Path, str]:
    """A file of a name that nobody can know, in each folder that is there: path -> what it says."""
    marks: dict[Path, str] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        path = folder.absolute() / f".shared-{secrets.token_hex(8)}"
        marks[path] = secrets.token_hex(8)
        try:
            path.write_text(marks[path], encoding="ascii")
        except OSError as error:
            want = "a folder that this user may write"
            raise UserError(Problem("the run cannot be written there", str(error), want, "run.folder")) from None
    return marks


def _find_unseen(path: Path, expected: str) -> str | None:
    """The folder of a mark that this rank cannot read; None if it can."""
    try:
        os.listdir(path.parent)  # noqa: PTH208 - which lets a network file system ask its server again
        if path.read_text(encoding="ascii") == expected:
            return None
    except (OSError, ValueError):
        pass
    return str(path.parent)
