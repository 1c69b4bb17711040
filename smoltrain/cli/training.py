"""Verbs that start a run: new, train, tune."""

import sys
import time
from typing import Annotated

import typer

from smoltrain.cli.app import app
from smoltrain.cli.arguments import (
    DefaultRecipeArgument,
    DeviceOption,
    OverridesArgument,
    OverridesCommand,
    RanksOption,
    RecipeArgument,
)


@app.command("new", epilog="Example: smoltrain new tiny --params 2M --data texts/")
def new_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME.yaml is written here, and never overwritten.")],
    *,
    params: Annotated[str, typer.Option(help="Parameters of the model: 2M, 135M, 1B.")],
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of the plan: 400M; by default 20 a parameter, at most 4 epochs.")
    ] = None,
    hours: Annotated[float | None, typer.Option(help="Length of the plan on these devices, instead of tokens.")] = None,
    device: DeviceOption = "cpu",
    world: Annotated[int | None, typer.Option(help="Ranks, each with one device; by default 1, on a CPU 2.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="A file, folder, glob or URL; by default Shakespeare's plays.")
    ] = None,
    hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Instead a dataset of the Hugging Face Hub.")
    ] = None,
    hub_config: Annotated[
        str | None, typer.Option(metavar="NAME", help="The dataset's configuration; by default its own.")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field or column of the text; by default text.")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Files that are held out; with --hub a split. By default a share of the documents."
        ),
    ] = None,
) -> None:
    """Write a recipe for a size and a text by published rules, each value with its source, and say what it takes."""
    from smoltrain.new_recipe.wish import TextOptions, check_wish
    from smoltrain.new_recipe.write import write_new_recipe

    text = TextOptions(data, hub, hub_config, text_field, validation)
    wish = check_wish(name, params, tokens=tokens, hours=hours, device=device, world=world, text=text)
    write_new_recipe(wish)


@app.command(
    "train",
    cls=OverridesCommand,
    epilog="Example: smoltrain train quickstart run.name=first phases.main.steps=100 --ranks 2",
)
def train_command(
    recipe: DefaultRecipeArgument = None, overrides: OverridesArgument = None, ranks: RanksOption = None
) -> None:
    """Train a recipe, or go on where its run folder stands."""
    began_at = time.time()  # before a second of imports
    from smoltrain.config.load import split_recipe_words
    from smoltrain.terminal import show_activity

    with show_activity("starting"):  # seconds, for torch is imported
        from smoltrain.launch.supervisor import supervise_run

    words = [word for word in (recipe, *(overrides or [])) if word is not None]
    sys.exit(supervise_run(*split_recipe_words(words), ranks, began_at))  # its record is the run: see run_app


@app.command("tune", cls=OverridesCommand, epilog="Example: smoltrain tune quickstart --lr 4e-3,8e-3 --steps 60")
def tune_command(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=V1,V2,...",
            help="Values to try, of any key; with one value it is used in all runs. smoltrain explain tells what each "
            "key means.",
        ),
    ] = None,
    *,
    lr: Annotated[
        str | None, typer.Option(metavar="V1,V2,...", help="Peak rates to try; final_lr moves with them.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of each run; by default those of the recipe's first phase.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="So many runs of each setting.")] = 1,
    ranks: RanksOption = None,
) -> None:
    """Compare values of keys by short runs on the same rows: a table, a plot, the best values as overrides."""
    from smoltrain.terminal import show_activity

    with show_activity("starting"):  # seconds, for torch is imported
        from smoltrain.tune.tune import tune_recipe

    raise typer.Exit(tune_recipe(recipe, overrides or [], lr=lr, steps=steps, num_seeds=seeds, ranks=ranks))
