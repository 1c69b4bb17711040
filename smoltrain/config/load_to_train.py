"""The config of a command that writes into the run's folder: a run's own config.yaml trains that run, and no other."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.config.yaml_text import read_yaml
from smoltrain.errors import Problem, UserError


def load_config_to_train(recipe: str, overrides: Sequence[str]) -> Config:
    """`load_config`, and a look at where the run will stand.

    Errors: as `load_config`; UserError for the config.yaml of a run that was moved or copied, or is read from another
    folder than it was trained from: it names the place of another run, which would go on instead, or begin.
    """
    config = load_config(recipe, overrides)
    path = Path(recipe)
    home = path.resolve().parent
    if path.name != CONFIG_FILE or not (home / "checkpoints").is_dir():
        return config
    written = read_yaml(path).get("run", {})  # none in somebody's own recipe of that name
    is_as_written = (str(config.run.folder), config.run.name) == (written.get("folder"), written.get("name"))
    if is_as_written and config.run_folder.resolve() != home:
        here = f"run.folder={shlex.quote(str(path.parent.parent))} run.name={shlex.quote(home.name)}"
        want = f"{here} to go on with the run that it lies in, or another run.name for a new one"
        raise UserError(Problem(f"{path} names another folder", str(config.run_folder), want, "the command line"))
    return config
