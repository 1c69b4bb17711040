"""How long each trainer takes to a validation loss: `python -m benchmarks.time_to_loss`.

All train the recipe's own text, the same rows in the same order, over the same plan, and are evaluated on the same
rows; each at several peak rates, of which the best one counts. Finished runs are kept, so a command that was cut short
goes on with those that are missing.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from benchmarks.command import OUT, OutOption, make_app, make_console, write_result
from benchmarks.contenders import (
    describe_comparison,
    enter_results_folder,
    load_task,
    make_our_contender,
    make_peer_contender,
    parse_kinds,
    parse_rates,
)
from benchmarks.loss_curves import MIN_STEPS, Entry, Reached, describe_edge, draw_curves, measure_reached
from benchmarks.peers import parse_peer_names, read_peer_versions
from benchmarks.real_rows import write_real_rows
from benchmarks.sweep import run_sweep, time_best_runs
from smoltrain.cli import OverridesArgument, RecipeArgument, run_app
from smoltrain.distributed.world import choose_device
from smoltrain.errors import Problem, TrainingStopped, UserError

PACKAGES = ("deepspeed", "transformers")
RESULTS = Path("time-to-loss")
EXPLANATION = (
    "never: not within its plan; seconds: steps x the median clean step (raw sum: those steps as they were); whole "
    "wall: from the command, with its start and the evaluations"
)


def benchmark_time_to_loss(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    against: Annotated[
        str,
        typer.Option(
            help="Other trainers: hf-trainer, hf-trainer+compile, hf-trainer+ds, litgpt, plain, plain+compile."
        ),
    ] = "hf-trainer",
    ours: Annotated[str, typer.Option(help="Our optimizers.")] = "adamw,muon",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the whole plan.")] = 160,
    our_steps: Annotated[str, typer.Option(help="Ours also over plans of so many steps, as in 80,100.")] = "",
    rates: Annotated[
        list[str], typer.Option(help="Peak rates to try, as in 1e-3,2e-3,4e-3; of one trainer: muon=4e-3,8e-3.")
    ] = ["1e-3,2e-3,4e-3"],  # noqa: B006 - typer reads it
    until_loss: Annotated[float | None, typer.Option(help="The loss to reach, nats per token.")] = None,
    until_best_of: Annotated[
        str, typer.Option(help="Or the best that this peer reaches in the plan; by default the first of --against.")
    ] = "",
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 10,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Draw a line between evaluations to see where the loss was reached.")
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=0, help="More runs of each best rate, in turn, for the seconds; 0: those that chose it.")
    ] = 0,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Micro-batch of the other trainers; by default the recipe's.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder that keeps each finished run; the same one goes on.")] = RESULTS,
    out: OutOption = OUT,
) -> None:
    """Measure how many steps, tokens and seconds each trainer takes to a validation loss, each at its best peak rate.

    Errors: UserError for recipe and names; TrainingStopped where the peer that sets the loss has no run.
    """
    overrides = overrides or []
    peers = parse_peer_names(against)
    if until_loss is None:
        until_best_of = until_best_of or next(iter(peers), "")
        if until_best_of not in peers:
            want = "one of --against, or a number in --until-loss"
            raise UserError(Problem("there is no loss to reach", repr(until_best_of), want, "--until-best-of"))
    plans = [steps, *_parse_our_steps(our_steps)]
    _check_plans(plans, every)
    tried = parse_rates(rates)
    results = results.resolve()
    config = load_task(recipe, overrides, steps, every, results)
    if peers and micro_batch is None and config.batch.micro_batch == "auto":
        raise UserError(Problem("the peers cannot choose for themselves", "auto", "a number", "--micro-batch"))
    micro_batch = micro_batch or config.batch.micro_batch_rows
    rows_per_step = config.batch.rows(1)
    digests = write_real_rows(config, steps, rows_per_step, results)
    enter_results_folder(results, describe_comparison(config, micro_batch, digests))
    with tempfile.TemporaryDirectory() as scratch:
        contenders = [
            make_our_contender(config, kind, plan, _rates_of(tried, kind), Path(scratch))
            for kind in parse_kinds(ours)
            for plan in dict.fromkeys(plans)
        ]
        contenders += [
            make_peer_contender(name, peer, config, micro_batch, _rates_of(tried, name), results)
            for name, peer in peers.items()
        ]
        cuda = choose_device(config.engine.device).type == "cuda"
        runs, failed = run_sweep(contenders, every, results, cuda=cuda)
        if not any(runs.values()):
            raise TrainingStopped(f"no trainer has finished: {failed}")
        entries = [Entry(c.name, c.steps, runs[c.name], []) for c in contenders if runs[c.name]]
        loss = until_loss if until_loss is not None else find_reference_loss(entries, until_best_of, failed)
        if rounds:
            entries = time_best_runs(contenders, entries, loss, every, rounds, results, cuda=cuda)
    reference = until_best_of or next(iter(peers), "")
    tokens_per_step = rows_per_step * config.batch.sequence_length
    reached = {entry.name: measure_reached(entry, loss, tokens_per_step, interpolate=interpolate) for entry in entries}
    _print_results(entries, reached, failed, loss, reference, interpolate=interpolate)
    picture = out.with_suffix(".png")
    draw_curves(entries, loss, picture)
    make_console().print(picture)
    settings = {
        "recipe": recipe, "overrides": overrides, "steps": steps, "every": every, "rounds": rounds,
        "until_loss": until_loss, "until_best_of": until_best_of, "interpolate": interpolate,
        "rows_per_step": rows_per_step, "sequence_length": config.batch.sequence_length,
        "peers_micro_batch": micro_batch, "validation_rows": config.evaluate.rows, "rows": digests,
    }  # fmt: skip
    environments = {peers[entry.name].environment for entry in entries if entry.name in peers}
    numbers = {
        "loss": loss, "measured": {entry.name: _to_numbers(entry, reached[entry.name]) for entry in entries},
        "not_measured": {f"{name}, {rate:g}": why for (name, rate), why in failed.items()},
        "peers": {name: read_peer_versions(name) for name in sorted(environments)},
    }  # fmt: skip
    write_result(out, settings, PACKAGES, numbers)


def make_table(entries: Sequence[Entry], reached: Mapping[str, Reached | None], reference: str) -> Table:
    """A line for each trainer; ratios are to the steps and the seconds of the reference, if that reached the loss."""
    heads = ("", "best\nrate", "final\nloss", "\nsteps", "\nratio", "\ntokens", "\nseconds", "\nratio", "whole\nwall s")
    columns = [Column(head, no_wrap=True) for head in heads]
    table = Table(*columns, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    base = reached.get(reference)
    for entry in entries:
        found = reached[entry.name]
        words = ["never"] + 5 * [""]
        if found:
            words = [
                f"{found.steps:.4g}", f"{found.steps / base.steps:.2f}" if base else "", f"{found.tokens:,.0f}",
                f"{found.seconds:.1f}", f"{found.seconds / base.seconds:.2f}" if base else "", f"{found.wall_s:.1f}",
            ]  # fmt: skip
        name = entry.name.replace(", ", "\n")  # narrow
        table.add_row(name, f"{entry.best_rate:g}", f"{entry.final_loss:.3f}", *words)
    return table


def describe_entry(entry: Entry, reached: Reached | None) -> str:
    """Each rate's loss at the end of the plan, whether the best may lie outside of them, and the steps' seconds."""
    losses = ", ".join(f"{run.evaluations[-1].loss:.3f} at {rate:g}" for rate, run in entry.runs.items())
    parts = [f"{entry.name}: {losses}", describe_edge(entry.best_rate, list(entry.runs))]
    parts.append(f"{entry.step_times.median_s:.3f} s a step, clean {entry.step_times.clean}")
    if reached:
        parts.append(f"raw sum {reached.raw_s:.1f} s")
    return "; ".join(part for part in parts if part)


def _print_results(
    entries: Sequence[Entry], reached: Mapping[str, Reached | None], failed: Mapping[tuple[str, float], str],
    loss: float, reference: str, *, interpolate: bool,
) -> None:  # fmt: skip
    console = make_console()
    how = "where the line between evaluations meets it" if interpolate else "at the first evaluation at or below it"
    ratios = f"; ratios are to {reference}" if reference else ""
    console.print(f"until a validation loss of {loss:.4f}, {how}{ratios}:", soft_wrap=True)
    console.print(make_table(entries, reached, reference))
    console.print(EXPLANATION, soft_wrap=True)
    for entry in entries:
        console.print(describe_entry(entry, reached[entry.name]), soft_wrap=True)
    measured = {entry.name for entry in entries}
    for (name, rate), why in failed.items():
        what = f"{name} at {rate:g} failed" if name in measured else f"{name} was not measured at {rate:g}"
        console.print(f"{what}: {why}", soft_wrap=True)


def find_reference_loss(entries: Sequence[Entry], peer: str, failed: Mapping[tuple[str, float], str]) -> float:
    """The lowest loss of the peer's run at its best rate. Errors: TrainingStopped where it has no such number."""
    for entry in entries:
        losses = [found.loss for found in entry.best.evaluations if math.isfinite(found.loss)]
        if entry.name == peer and losses:
            return min(losses)
    why = [why for (name, _), why in failed.items() if name == peer]
    raise TrainingStopped(f"{peer}, which sets the loss to reach, has none: {why[0] if why else 'no loss is finite'}")


def _rates_of(tried: Mapping[str, tuple[float, ...]], name: str) -> tuple[float, ...]:
    """Errors: UserError where none were given."""
    rates = tried.get(name) or tried.get("")
    if not rates:
        raise UserError(Problem(f"{name} has no rates to try", "none", "three or more", "--rates"))
    return rates


def _parse_our_steps(words: str) -> list[int]:
    """Errors: UserError."""
    try:
        return [int(word) for word in words.split(",") if word.strip()]
    except ValueError:
        raise UserError(Problem("these are no steps", words, "whole numbers, as in 80,100", "--our-steps")) from None


def _check_plans(plans: Sequence[int], every: int) -> None:
    """Errors: UserError for plans that are too short, or whose end is no evaluation."""
    for plan in plans:
        if plan < MIN_STEPS:
            raise UserError(Problem("too few steps to measure", str(plan), f"{MIN_STEPS} or more", "--steps"))
        if plan > plans[0]:
            raise UserError(Problem("ours would train on more rows", str(plan), f"at most {plans[0]}", "--our-steps"))
        if plan % every:
            raise UserError(Problem(f"no evaluation at the end of {plan} steps", str(every), "a divisor", "--every"))


def _to_numbers(entry: Entry, reached: Reached | None) -> dict[str, Any]:
    return {
        "steps": entry.steps, "best_rate": entry.best_rate, "final_loss": entry.final_loss,
        "reached": asdict(reached) if reached else None, "step": asdict(entry.step_times),
        "runs": {f"{rate:g}": asdict(run) for rate, run in entry.runs.items()},
        "timed": [asdict(run) for run in entry.timed],
    }  # fmt: skip


app = make_app(benchmark_time_to_loss, "quickstart --against hf-trainer,litgpt --rates 1e-3,2e-3,4e-3")

if __name__ == "__main__":
    run_app(app)
