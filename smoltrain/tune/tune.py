"""The verb `smoltrain tune`: train a grid of short runs, and say what it came to."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from smoltrain import files
from smoltrain.config.load import load_config
from smoltrain.errors import DONE, FAULT, UserError
from smoltrain.estimate.constants import GPU_OF_CUDA_NAME
from smoltrain.estimate.devices import find_device
from smoltrain.estimate.fitting import build_fitted_setup, fit_config_to_memory
from smoltrain.estimate.report import Estimate
from smoltrain.run.plots import draw_grid
from smoltrain.run.screen import Screen
from smoltrain.run.summary import format_seconds
from smoltrain.terminal import open_console, print_text, show_activity
from smoltrain.tune.grid import Axis, GridPoint, make_lr_axis, shorten_keys
from smoltrain.tune.planning import Tuning, plan_tuning
from smoltrain.tune.report import (
    TuneReport,
    build_settings_table,
    choose_drawn_axis,
    describe_loss_column,
    format_steps,
    list_verdicts,
    make_curves,
    report_to_json,
)
from smoltrain.tune.result import Setting, compare_with_best, find_edges, sort_settings
from smoltrain.tune.run_trials import train_trials
from smoltrain.tune.short_plan import describe_short_plan
from smoltrain.tune.trials import QUIET_WORDS, Outcome, Trial, find_other_rows, read_outcome

RESULTS_FILE = "results.json"  # in the tuning's folder: of its newest command
PICTURE_FILE = "loss.png"


def tune_recipe(
    recipe: str, words: list[str], *, lr: str | None, steps: int | None, num_seeds: int, ranks: int | None
) -> int:
    """Train a grid of short runs, or go on with it; print the table and the best. Returns the exit code (errors.py).

    Errors: UserError for anything in the words that some run could not start with, before the first one does.
    """
    tuning = plan_tuning(recipe, words, lr=lr, steps=steps, num_seeds=num_seeds, ranks=ranks)
    say_plan(tuning)
    code, outcomes = train_trials(tuning.trials, ranks, [recipe, *tuning.base_words])
    if code != DONE:
        return code
    report = make_report(tuning, outcomes)
    say_report(report)
    for path in write_report(tuning, report):
        print(path)
    return DONE if report.best else FAULT


def say_plan(tuning: Tuning) -> None:
    """What is going to be trained, before it is."""
    screen = Screen()
    short = shorten_keys([axis.key for axis in tuning.axes])
    factors = [f"{len(axis.values)} {short[axis.key]}" for axis in tuning.axes]
    seeds = tuning.seeds
    factors.append(f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed")
    left = [trial for trial in tuning.trials if read_outcome(trial) is None]
    num_done = len(tuning.trials) - len(left)
    done = f", {num_done} of them trained before" if num_done else ""
    screen.say_choice("runs", f"{' x '.join(factors)} = {len(tuning.trials)}, one after another{done}")
    others = tuple(phase.name for phase in tuning.base.phases[1:])
    if len(tuning.steps) > 1:
        told = f"{format_steps(tuning.steps)} of phase {tuning.phase.name}, as many tokens in each run"
        screen.say_choice("plans", told + (f"; without {', '.join(others)}" if others else ""))
    else:
        short_phase = tuning.trials[0].config.phases[0]
        screen.say_choice("plan of each", describe_short_plan(tuning.phase, short_phase, others))
    if tuning.scales_final_lr:
        screen.say_choice("final_lr", "moves with --lr, so that the schedule keeps its shape")
    if left:
        with show_activity("estimating"):
            time_text = _estimate_time(left, tuning)
        screen.say_choice("time", time_text)
    screen.say_choice("folder", str(tuning.folder))


def _estimate_time(left: Sequence[Trial], tuning: Tuning) -> str:
    """How long the steps of these runs will take together, in words: as long as those of runs that are done, if any."""
    runs = f"{len(left)} run{'s' * (len(left) > 1)}"
    ranks = f"{tuning.num_ranks} rank{'s' * (tuning.num_ranks > 1)}"
    measured = _measure_token_s(tuning)
    if measured is not None:
        total_s = sum(trial.steps * _count_step_tokens(trial, tuning) for trial in left) * measured
        return f"about {format_seconds(total_s)} for the steps of {runs} (as those before), and the starts"
    name = "cpu"
    if tuning.device.type != "cpu":
        cuda_name = torch.cuda.get_device_name() if tuning.device.type == "cuda" else tuning.device.type
        if cuda_name not in GPU_OF_CUDA_NAME:
            return f"not known: no data sheet of {cuda_name} is known here"
        name = GPU_OF_CUDA_NAME[cuda_name]
    device = find_device(name, tuning.num_ranks)
    seconds_of: dict[GridPoint, float] = {}
    for trial in left:
        if trial.point not in seconds_of:
            config = fit_config_to_memory(trial.config, device.memory, tuning.num_ranks, device=device.kind)
            setup = build_fitted_setup(config, device.memory, tuning.num_ranks, device=device.kind)
            seconds_of[trial.point] = trial.steps * Estimate(setup, device).speed.step_s
    total_s = sum(seconds_of[trial.point] for trial in left)
    return f"about {format_seconds(total_s)} for the steps of {runs} on {ranks} (estimated), and the starts"


def _measure_token_s(tuning: Tuning) -> float | None:
    """Mean seconds of a target in the runs that are done, whose steps may have other rows; None if there are none."""
    speeds = [outcome.tokens_per_s for outcome in map(read_outcome, tuning.trials) if outcome is not None]
    seconds = [1 / speed for speed in speeds if speed > 0]  # not of nan
    return mean(seconds) if seconds else None


def _count_step_tokens(trial: Trial, tuning: Tuning) -> int:
    """Targets of a step, all ranks."""
    batch = trial.config.batch
    return batch.rows(tuning.num_ranks) * batch.sequence_length


# ---- after


def make_report(tuning: Tuning, outcomes: Sequence[Outcome]) -> TuneReport:
    """What all runs together say."""
    settings = sort_settings(gather_settings(tuning.trials, outcomes))

    def is_valid(axis: Axis, value: str) -> bool:
        words = [f"{axis.key}={value}"]
        if axis.words[0][0] != axis.words[0][-1]:  # a rate that has a final_lr beside it
            words = list(make_lr_axis(value, tuning.base.phases[0]).words[0])
        try:
            load_config(tuning.recipe, [*QUIET_WORDS, *tuning.base_words, *settings[0].point.words, *words])
        except UserError:
            return False
        return True

    edges = [] if settings[0].diverged_at else find_edges(settings[0].point, tuning.axes, is_valid)
    return TuneReport(
        axes=tuning.axes, seeds=tuning.seeds, steps=tuning.steps,
        phase_steps=tuning.steps[0] if len(tuning.steps) == 1 else tuning.phase.num_steps,
        planned_steps=tuning.planned_steps, settings=settings, comparisons=compare_with_best(settings), edges=edges,
        recipes_own=tuning.recipes_own, later_phases=tuning.base.phases[1:], rows_note=_describe_rows(tuning, outcomes),
    )  # fmt: skip


def gather_settings(trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> list[Setting]:
    """The runs of each point together."""
    by_point: dict[GridPoint, list[tuple[Trial, Outcome]]] = {}
    for trial, outcome in zip(trials, outcomes, strict=True):
        by_point.setdefault(trial.point, []).append((trial, outcome))
    settings: list[Setting] = []
    for point, runs in by_point.items():
        losses = {trial.seed: outcome.loss for trial, outcome in runs if outcome.diverged_at is None}
        diverged = {trial.seed: outcome.diverged_at for trial, outcome in runs if outcome.diverged_at is not None}
        speed = sum(outcome.tokens_per_s for _, outcome in runs) / len(runs)
        settings.append(Setting(point, losses, diverged, speed, runs[0][0].steps))
    return settings


def _describe_rows(tuning: Tuning, outcomes: Sequence[Outcome]) -> str:
    """Whether the runs of a seed trained on the same rows, by their ledgers."""
    if len(tuning.rows_per_step) > 1:
        counts = " to ".join(f"{count:,}" for count in (min(tuning.rows_per_step), max(tuning.rows_per_step)))
        if len(tuning.steps) > 1:
            steps = format_steps(tuning.steps)
            return f"a step has {counts} rows, so the losses are after equal tokens, up to a step, in {steps}"
        return f"WARNING: a step has {counts} rows, so the losses are after equal steps, not after equal tokens"
    pairs = find_other_rows(tuning.trials, outcomes)
    if pairs:
        one, other = pairs[0]
        return (
            "WARNING: runs of one seed did not train on the same rows, so their losses cannot be compared: "
            f"{one.folder} and {other.folder}; have the data changed meanwhile?"
        )
    [rows] = tuning.rows_per_step
    [steps] = tuning.steps
    return f"all runs of a seed trained on the same {rows * steps:,} rows in the same order (by their ledgers)"


def say_report(report: TuneReport) -> None:
    """The table and the verdicts."""
    console = open_console()
    screen = Screen()
    print()
    print_text(describe_loss_column(report), console)
    console.print(build_settings_table(report))
    print()
    print_text(report.rows_note, console)
    for line in list_verdicts(report):
        screen.say_summary(line)


def write_report(tuning: Tuning, report: TuneReport) -> list[Path]:
    """results.json and loss.png in the tuning's folder; their paths."""
    tree = {"recipe": tuning.recipe, "words": tuning.base_words, **report_to_json(report)}
    tree["runs"] = [str(trial.folder) for trial in tuning.trials]
    files.write_json_file(tuning.folder / RESULTS_FILE, tree)
    curves, ticks = make_curves(report)
    axis = tuning.axes[choose_drawn_axis(tuning.axes)]
    title = f"{tuning.base.run.name}, {format_steps(tuning.steps)}"
    draw_grid(curves, axis.key, ticks, title, tuning.folder / PICTURE_FILE)
    return [tuning.folder / RESULTS_FILE, tuning.folder / PICTURE_FILE]
