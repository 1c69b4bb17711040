"""The `smoltrain` command: parses arguments, calls one function for each verb, and turns mistakes into exit codes.

`app.py` is the frame, `arguments.py` what several verbs take; each other file has the verbs of one kind of thing.
"""

from smoltrain.cli import evaluation, machine, models, prepare, recipes, runs, training  # noqa: F401 # registers verbs
from smoltrain.cli.app import PANELS, app, main, run_app
from smoltrain.cli.arguments import OverridesArgument, RecipeArgument

__all__ = ["PANELS", "OverridesArgument", "RecipeArgument", "app", "main", "run_app"]
