"""Verbs that look at runs, meanwhile and afterwards: runs, watch, summary, plot, report, compare, profile, verify."""

from pathlib import Path
from typing import Annotated

import typer

from smoltrain.cli.app import app
from smoltrain.cli.arguments import AtLeastOneRankOption, OverridesArgument, OverridesCommand, RunArgument, complete_run
from smoltrain.errors import FAULT, Problem, UserError


@app.command("runs", epilog="Example: smoltrain runs --json")
def runs_command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The folder of the runs; without it, runs.")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects instead of a table.")] = False,
) -> None:
    """List all runs: which are running, waiting, failed, stopped, done; step, losses, tokens/s, last sign of life."""
    from smoltrain.config.config_file import RUNS_FOLDER
    from smoltrain.monitor.runs_table import print_runs

    print_runs(folder or RUNS_FOLDER, is_default=folder is None, as_json=as_json)


@app.command("watch", epilog="Example: smoltrain watch quickstart")
def watch_command(
    run: RunArgument,
    *,
    once: Annotated[bool, typer.Option("--once", help="Show it once and leave, as through a pipe.")] = False,
) -> None:
    """Watch a run live in the terminal until it ends: progress, losses, speed, warnings, samples. Ctrl-C leaves."""
    from smoltrain.monitor.watch import watch_run

    watch_run(run, once=once)


@app.command("compare", epilog="Example: smoltrain compare one two --png losses.png")
def compare_command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Run folders, or names of runs under runs/.", autocompletion=complete_run
        ),
    ],
    *,
    png: Annotated[
        Path | None, typer.Option(help="Draw their losses over steps, tokens and hours into this file.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write all of it as one page into this file.")] = None,
) -> None:
    """Lay runs side by side: losses, throughput, what differs in their configs, and whether their rows are the same."""
    from smoltrain.monitor.compare import compare_named_runs, format_comparison
    from smoltrain.monitor.comparison_page import render_page
    from smoltrain.monitor.comparison_plot import render_png, write_picture

    comparison = compare_named_runs(runs)
    print("\n".join(format_comparison(comparison)))
    if png is not None:
        write_picture(png, render_png(comparison.runs), "--png")
        print(png)
    if html is not None:
        write_picture(html, render_page(comparison).encode(), "--html")
        print(html)


@app.command("plot", epilog="Example: smoltrain plot quickstart")
def plot_command(run: RunArgument) -> None:
    """Draw a run's curves: loss, learning rate, gradient norm, throughput, unique rows."""
    from smoltrain.config.load import read_run_config
    from smoltrain.inference.find_run import find_run_folder
    from smoltrain.run.plots import draw_run
    from smoltrain.schedule import Plan

    folder = find_run_folder(run)
    for path in draw_run(Plan(read_run_config(folder / "config.yaml").phases), folder):
        print(path)


@app.command("summary", epilog="Example: smoltrain summary quickstart")
def summary_command(run: RunArgument) -> None:
    """Say what a run has come to: losses, tokens, where its time went, what to do next."""
    from smoltrain.inference.find_run import find_run_folder
    from smoltrain.run.summary import describe_run_folder

    print(describe_run_folder(find_run_folder(run)))


@app.command("report", epilog="Example: smoltrain report quickstart")
def report_command(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="File or folder for the page; by default RUN/report.html.")
    ] = None,
) -> None:
    """Write a run as one HTML page: curves, gradients, speed, data, samples, events, config."""
    from smoltrain.inference.find_run import find_run_folder
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
    from smoltrain.inference.find_run import locate_run
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


@app.command(
    "profile", cls=OverridesCommand, epilog="Example: smoltrain profile quickstart batch.micro_batch=8 --ranks 1"
)
def profile_command(
    source: Annotated[str, typer.Argument(metavar="RUN|RECIPE", help="A run, or a recipe if no run is called so.")],
    overrides: OverridesArgument = None,
    *,
    steps: Annotated[int, typer.Option(min=1, max=100, help="How many steps are recorded.")] = 3,
    ranks: AtLeastOneRankOption = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where the trace goes; by default profile-NAME.json.gz.")
    ] = None,
) -> None:
    """Train a few steps, and say where the time of a step goes, with a trace and what to change."""
    from smoltrain.terminal import show_activity

    with show_activity("starting"):  # seconds, for torch is imported
        from smoltrain.profiling.profile import profile_recipe

    profile_recipe(source, overrides or [], steps=steps, ranks=ranks, trace=trace)
