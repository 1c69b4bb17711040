"""Which run, checkpoint or Hugging Face folder a word of the command line means."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from smoltrain.checkpoint.manifest import (
    Manifest,
    find_newest_valid_checkpoint,
    list_checkpoint_steps,
    step_folder,
    verify_checkpoint,
)
from smoltrain.config.config_file import CONFIG_FILE, RUNS_FOLDER
from smoltrain.config.load import YAML_SUFFIXES, list_recipes, load_config, read_run_config
from smoltrain.config.schema import Config
from smoltrain.errors import Problem, UserError, format_value

EXPORT_MARKER_FILE = "smoltrain.json"  # in exports that passed: what they are of, and what their files are
CHECKPOINT_FOLDER_PATTERN = re.compile(r"step-([0-9]{8,})")  # the name of a published checkpoint's folder

# What the word for a model may be beside a run's name, for those who take any of it.
RUN_OR_CHECKPOINT = "the folder of a run or of its checkpoint"
ANY_MODEL = f"{RUN_OR_CHECKPOINT}, a Hugging Face folder"


def is_huggingface_folder(folder: Path) -> bool:
    """Whether the folder is one of transformers' and no run."""
    return (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file()


def find_run_folder(run: str, kinds: str = "the folder of a run") -> Path:
    """The folder of a run, which is named by its path or by its name under runs/. Errors: UserError if it is none."""
    folder, step = locate_run(run, kinds=kinds)
    if step is not None:
        want = f"the run, {folder}"
        raise UserError(Problem("this is one checkpoint of a run", repr(run), want, "the RUN argument"))
    return folder


def locate_run(
    source: str, runs: Path = RUNS_FOLDER, change: str = "the RUN argument", kinds: str = RUN_OR_CHECKPOINT
) -> tuple[Path, int | None]:
    """The folder of a run; and, where `source` is the folder of one of its checkpoints, the step of that.

    The checkpoint itself need not be there. `kinds`: what else than a name under `runs` whoever asks takes.
    Errors: UserError if there is no such run.
    """
    for folder in (Path(source), runs / source):
        if (folder / CONFIG_FILE).is_file():
            return folder, None
        for path in (folder, folder.resolve()):  # as it was named, if that says enough
            step_name = CHECKPOINT_FOLDER_PATTERN.fullmatch(path.name)
            run = path.parent.parent
            if step_name and path.parent.name == "checkpoints" and (run / CONFIG_FILE).is_file():
                return run, int(step_name[1])
    want = find_run_of_recipe(source)
    if want is not None:
        raise UserError(Problem("a recipe is no run", repr(source), want, change))
    have = ", ".join(sorted(path.parent.name for path in runs.glob(f"*/{CONFIG_FILE}"))) or "none yet"
    want = f"{kinds}, or a name under {runs}/ ({have})"
    raise UserError(Problem("no such run", repr(source), want, change))


def read_relocated_config(folder: Path) -> Config:
    """A run's own config, wherever its folder lies now. Errors: UserError for one that this version cannot read."""
    config = read_run_config(folder / CONFIG_FILE)
    here = config.run.model_copy(update={"folder": folder.parent, "name": folder.name})
    return config.model_copy(update={"run": here})


def find_run_of_recipe(source: str) -> str | None:
    """What to want where a recipe is named in place of a run: the run of it, or how to make one; None for no recipe."""
    path = Path(source)
    if path.name == CONFIG_FILE and path.is_file():
        return f"the run that it lies in, {path.parent}"
    if not (path.suffix in YAML_SUFFIXES and path.is_file()) and source not in list_recipes():
        return None
    make_one = f"a run: `smoltrain train {shlex.quote(source)}` makes one"
    try:
        folder = load_config(source).run_folder
    except UserError:  # which that command says
        return make_one
    return f"the run of this recipe, {folder}" if (folder / CONFIG_FILE).is_file() else make_one


def find_valid_manifest(run: Path, step: int | None, change: str, say: Callable[[str], None]) -> Manifest:
    """The manifest of a run's checkpoint of this step, or of its newest one that verifies.

    Errors: UserError if there is none.
    """
    if step is None:
        newest = find_newest_valid_checkpoint(run / "checkpoints", say)
        if newest is None:
            raise UserError(Problem("this run has no checkpoint yet", str(run), "at least one", change))
        return newest
    manifest = verify_checkpoint(find_checkpoint_folder(run, step, change))
    if isinstance(manifest, str):
        raise UserError(Problem("the checkpoint is not whole", manifest, "the file as it was written", change))
    return manifest


def find_checkpoint_folder(run: Path, step: int, change: str) -> Path:
    """The folder of a run's checkpoint of this step, unread. Errors: UserError if there is none."""
    checkpoints = run / "checkpoints"
    steps = list_checkpoint_steps(checkpoints)
    if step not in steps:
        want = f"one of {', '.join(map(str, steps))}" if steps else "a run that has saved one"
        raise UserError(Problem("no checkpoint of this step", format_value(step), want, change))
    return step_folder(checkpoints, step)
