"""Verbs that judge a model: perplexity, eval, memorisation."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from smoltrain.cli.app import app
from smoltrain.cli.arguments import CheckpointOption, ModelArgument, RunArgument

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else on stdout.")]


@app.command("eval", epilog="Example: smoltrain eval quickstart --tasks smoltrain_sentences")
def eval_command(
    run: ModelArgument,
    *,
    tasks: Annotated[
        str, typer.Option(metavar="TASK,TASK,...", help="Tasks of lm-evaluation-harness, or smoltrain_sentences.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most; by default all.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; by default as each task says.")
    ] = None,
    as_json: JsonOption = False,
    checkpoint: CheckpointOption = None,
) -> None:
    """Measure a model on tasks of lm-evaluation-harness; the numbers go to RUN/evaluations/ too."""
    from smoltrain.evaluation.evaluate_model import EvaluationOptions, evaluate_model, format_metrics, parse_task_names

    options = EvaluationOptions(parse_task_names(tasks), limit, fewshot)
    found = evaluate_model(run, options, checkpoint, say=_say_aside)
    if as_json:
        print(json.dumps({**found.evaluation, "notes": found.notes}, indent=1))
        return
    for line in (*format_metrics(found.evaluation), *found.notes):
        print(line)
    print(f"written to {found.file}" if found.file else "not written: a Hugging Face folder is left as it is")


@app.command("perplexity", epilog="Example: smoltrain perplexity quickstart README.md --stride 128")
def perplexity_command(
    run: ModelArgument,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Texts in UTF-8, or .jsonl and .parquet, of which each record is one."),
    ],
    *,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between the beginnings of two windows; by default half of --context.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", "--max-length", help="Tokens that the model reads at most; by default as it was trained."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text in .jsonl and .parquet.")] = "text",
    as_json: JsonOption = False,
    checkpoint: CheckpointOption = None,
) -> None:
    """Say how well a model predicts texts: perplexity, nats per token, bits per byte."""
    from smoltrain.evaluation.evaluate_model import describe_source
    from smoltrain.evaluation.perplexity import add_up, choose_windows, format_text_loss, measure_file
    from smoltrain.inference.device import move_to_best_device
    from smoltrain.inference.load import load_trained_model
    from smoltrain.terminal import show_activity

    loaded = load_trained_model(run, checkpoint)
    windows = choose_windows(loaded, context, stride)
    move_to_best_device(loaded.model)
    source = describe_source(loaded)
    _say_aside(f"computes on {source['device']} in fp32, {windows.describe()}")
    found = []
    for path in files:
        with show_activity(f"reading {path}"):
            text = measure_file(loaded, path, windows, text_field)
        if not as_json:
            print(format_text_loss(text), flush=True)
        found.append(text)
    whole = add_up(found)
    if as_json:
        settings = {"context": windows.context, "stride": windows.stride}
        print(json.dumps({**source, **settings, **whole.as_dict(), "files": [text.as_dict() for text in found]}))
    elif len(found) > 1:
        print(format_text_loss(whole))


@app.command("memorisation", epilog="Example: smoltrain memorisation quickstart")
def memorisation_command(
    run: RunArgument,
    *,
    texts: Annotated[
        int, typer.Option(min=1, max=4096, help="Of each kind: after held-out prompts, after training prompts.")
    ] = 32,
    checkpoint: CheckpointOption = None,
) -> None:
    """Say how much of what a model writes stands in its training tokens, word for word, beside held-out text."""
    from smoltrain.evaluation.memorisation_report import describe_run_memorisation

    print(describe_run_memorisation(run, checkpoint, texts, say=_say_aside))


def _say_aside(text: str) -> None:
    """A line that is no result."""
    print(text, file=sys.stderr)
