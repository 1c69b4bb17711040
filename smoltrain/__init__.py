"""smoltrain pretrains small language models (80M-1B parameters) on one to many GPUs; and as a library, in ten lines:

    import smoltrain

    config = smoltrain.load_config("quickstart", {"phases.main.steps": 100}, run={"name": "first"})
    run = smoltrain.train(config)
    print(run.metrics()["train/loss_nats_per_token"])
    model = run.load()
    print(model.generate("To be", max_tokens=40), model.loss("To be, or not to be"))

Importing it costs nothing: each name is imported when it is first used.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from smoltrain.openmp import choose_waiting
from smoltrain.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from smoltrain.config.load import list_recipes as list_recipes
    from smoltrain.config.load import load_config as load_config
    from smoltrain.config.schema import Config as Config
    from smoltrain.errors import TrainingStopped as TrainingStopped
    from smoltrain.errors import UserError as UserError
    from smoltrain.library.model import Model as Model
    from smoltrain.library.model import load as load
    from smoltrain.library.run import Run as Run
    from smoltrain.library.run import Sample as Sample
    from smoltrain.library.training import train as train

__all__ = [
    "Config", "Model", "Run", "Sample", "TrainingStopped", "UserError", "list_recipes", "load", "load_config", "train",
]  # fmt: skip

_HOMES = {
    "Config": "config.schema",
    "Model": "library.model",
    "Run": "library.run",
    "Sample": "library.run",
    "TrainingStopped": "errors",
    "UserError": "errors",
    "list_recipes": "config.load",
    "load": "library.model",
    "load_config": "config.load",
    "train": "library.training",
}


if not TYPE_CHECKING:  # type checkers know the names, and what is none of them

    def __getattr__(name: str) -> Any:
        """Import what is asked for; the next time it is here. Errors: AttributeError."""
        if name not in _HOMES:
            raise AttributeError(f"module 'smoltrain' has no attribute {name!r}")
        value = getattr(_import_room(_HOMES[name]), name)
        globals()[name] = value
        return value


def _import_room(module: str) -> ModuleType:
    """Import a module of the package; if torch comes with it, OpenMP's threads wait as smoltrain/openmp.py has it.

    OpenMP reads the variables when torch is loaded; the environment stays as it is.
    """
    chosen = {} if "torch" in sys.modules else choose_waiting()
    os.environ.update(chosen)
    try:
        return importlib.import_module(f"smoltrain.{module}")
    finally:
        for variable in chosen:
            os.environ.pop(variable, None)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
