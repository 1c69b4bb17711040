"""Verbs that judge a trained model: memorisation."""

import sys
from typing import Annotated

import typer

from smoltrain.cli.app import app
from smoltrain.cli.arguments import CheckpointOption, RunArgument


@app.command("memorisation", epilog="Example: smoltrain memorisation quickstart")
def memorisation_command(
    run: RunArgument,
    *,
    texts: Annotated[int, typer.Option(min=1, max=4096, help="So many texts are drawn.")] = 32,
    checkpoint: CheckpointOption = None,
) -> None:
    """Say how much of what a model writes stands in its training tokens, word for word, beside held-out text."""
    from smoltrain.evaluation.memorisation_report import describe_run_memorisation

    print(describe_run_memorisation(run, checkpoint, texts, say=lambda text: print(text, file=sys.stderr)))
