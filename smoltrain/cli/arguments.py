"""Arguments and options that several verbs take, and how a shell completes them."""

import glob
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


def _complete_recipe(incomplete: str) -> list[str]:
    from smoltrain.config.load import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Keys and sections that begin so."""
    from smoltrain.explain import list_explained_words

    return [word for word in list_explained_words() if word.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Runs under runs/ whose name begins so."""
    return [path.parent.name for path in Path("runs").glob(f"{glob.escape(incomplete)}*/config.yaml")]


RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run folder, or the name of one under runs/.", autocompletion=complete_run),
]


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run folder, the name of one under runs/, the folder of a checkpoint, or a Hugging Face folder.",
        autocompletion=complete_run,
    ),
]


CheckpointOption = Annotated[
    int | None, typer.Option(help="Step of the checkpoint; by default the one that RUN names, or the run's newest.")
]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name (smoltrain recipes lists them), or a path to a .yaml file.",
        autocompletion=_complete_recipe,
    ),
]


DefaultRecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name (smoltrain recipes lists them), or a path to a .yaml file; without it, "
        "quickstart.",
        autocompletion=_complete_recipe,
    ),
]


RanksOption = Annotated[int | None, typer.Option(help="Processes; by default one per GPU, or two on a CPU.")]


AtLeastOneRankOption = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Processes; by default one per GPU, or two on a CPU.")
]


DeviceOption = Annotated[
    str, typer.Option(help="h200, h100, a100-80, a100-40, l4, 4090, or cpu: this machine, measured.")
]


OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Values to use instead of the recipe's; smoltrain explain tells what each key means."
    ),
]


class OverridesCommand(TyperCommand):
    """A verb that takes KEY=VALUE, also as `--key=value` and `--key value` where it has no such option itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Turn the options that are keys of a recipe into overrides before typer reads the others."""
        from smoltrain.config.keys import read_key_options

        own = {name: not getattr(option, "is_flag", False) for option in self.get_params(ctx) for name in option.opts}
        options = {name: takes_value for name, takes_value in own.items() if name.startswith("-")}
        return super().parse_args(ctx, args if ctx.resilient_parsing else read_key_options(args, options))
