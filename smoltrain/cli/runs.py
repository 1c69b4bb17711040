"""Verbs that look at a run, meanwhile and afterwards: summary, report, plot, verify."""

from pathlib import Path
from typing import Annotated

import typer

from smoltrain.cli.app import app
from smoltrain.cli.arguments import RunArgument
from smoltrain.errors import FAULT, Problem, UserError


@app.command("plot", epilog="Example: smoltrain plot quickstart")
def plot_command(run: RunArgument) -> None:
    """Draw a run's curves: loss, learning rate, gradient norm, throughput, unique rows."""
    from smoltrain.config.load import read_run_config
    from smoltrain.inference.load import find_run_folder
    from smoltrain.run.plots import draw_run
    from smoltrain.schedule import Plan

    folder = find_run_folder(run)
    for path in draw_run(Plan(read_run_config(folder / "config.yaml").phases), folder):
        print(path)


@app.command("summary", epilog="Example: smoltrain summary quickstart")
def summary_command(run: RunArgument) -> None:
    """Say what a run has come to: losses, tokens, where its time went, what to do next."""
    from smoltrain.inference.load import find_run_folder
    from smoltrain.run.summary import describe_run_folder

    print(describe_run_folder(find_run_folder(run)))


@app.command("report", epilog="Example: smoltrain report quickstart")
def report_command(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Where to write the page; by default RUN/report.html.")
    ] = None,
) -> None:
    """Write a run as one HTML page: curves, gradients, speed, data, samples, events, config."""
    from smoltrain.inference.load import find_run_folder
    from smoltrain.report.report import write_run_report

    print(write_run_report(find_run_folder(run), out))


@app.command("verify", epilog="Example: smoltrain verify runs/first/checkpoints/step-00000500 --forward")
def verify_command(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A run (folder, or name under runs/), or the folder of a checkpoint.")
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="Another run: did both train on the same rows?")
    ] = None,
    *,
    forward: Annotated[
        bool, typer.Option("--forward", help="Also compute the validation loss again, as it was when saved.")
    ] = False,
) -> None:
    """Check a run's ledger and checkpoints, or one checkpoint: files, shapes, finite numbers, place in the data."""
    from smoltrain.inference.load import locate_run
    from smoltrain.run.verify import compare_runs, verify_one_checkpoint, verify_run

    if other is not None:
        if forward:
            what = "two runs are compared by their rows alone"
            raise UserError(Problem(what, "--forward with OTHER", "one run or checkpoint", "--forward or OTHER"))
        is_sound = compare_runs(path, other)
    else:
        folder, step = locate_run(path)
        if step is None:
            is_sound = verify_run(folder, forward=forward)
        else:
            is_sound = verify_one_checkpoint(folder, step, forward=forward)
    if not is_sound:
        raise typer.Exit(FAULT)
