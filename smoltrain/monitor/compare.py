"""`smoltrain compare`: runs side by side: what they came to, how their configs differ, and whether their rows do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain.checkpoint.identity import find_config_differences
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.load import read_run_config
from smoltrain.config.schema import Config
from smoltrain.errors import Problem, UserError, format_value
from smoltrain.inference.find_run import find_run_folder
from smoltrain.monitor.curves import RunCurves, read_run_curves
from smoltrain.monitor.run_status import RECENT_STEPS, RunStatus, read_run_status
from smoltrain.run.row_ledger import compare_row_histories, read_row_history
from smoltrain.run.summary import RunSummary, format_seconds, summarise_run
from smoltrain.schedule import Plan

MAX_RUNS = 8  # that a picture has colours for
NOT_COMPARED = ("run.name", "run.folder", "run.stop_after")  # where a run lies, and where its newest start was to end
NOTHING = "-"


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs."""

    label: str  # the shortest end of its path that no other run has
    folder: Path
    config: Config
    status: RunStatus
    summary: RunSummary
    curves: RunCurves


@dataclass(frozen=True)
class TableRow:
    """A number or a key, and what it is in each run."""

    name: str
    cells: list[str]


@dataclass(frozen=True)
class RunComparison:
    """Several runs, and what there is to say of them."""

    runs: list[ComparedRun]
    results: list[TableRow]
    differences: list[TableRow]  # of their configs, keys that are the same in all left out
    verdicts: list[str]  # of their rows, each of the others beside the first


def compare_named_runs(sources: Sequence[str]) -> RunComparison:
    """Read runs that are named by folder or by name, and lay them side by side.

    Errors: UserError for fewer than two runs or too many, one that is not there, and records that cannot be read.
    """
    if not 2 <= len(sources) <= MAX_RUNS:
        want = f"2 to {MAX_RUNS}"
        raise UserError(Problem("so many runs cannot be compared", str(len(sources)), want, "the RUN arguments"))
    folders = [find_run_folder(source) for source in sources]
    repeated = [str(folder) for folder, source in zip(folders, sources, strict=True) if folders.count(folder) > 1]
    if repeated:
        raise UserError(Problem("a run is compared with itself", repeated[0], "runs that differ", "the RUN arguments"))
    runs = [_read_run(folder, label) for folder, label in zip(folders, shorten_paths(folders), strict=True)]
    verdicts = [describe_rows(runs[0].folder, run.folder) for run in runs[1:]]
    return RunComparison(runs, list_results(runs), list_differences([run.config for run in runs]), verdicts)


def _read_run(folder: Path, label: str) -> ComparedRun:
    config = read_run_config(folder / CONFIG_FILE)
    summary = summarise_run(Plan(config.phases), folder)
    return ComparedRun(label, folder, config, read_run_status(folder), summary, read_run_curves(folder))


def shorten_paths(folders: Sequence[Path]) -> list[str]:
    """Names by which the folders are told apart: the last part of each path, or more of them where two are alike."""
    absolute = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, absolute)) + 1):
        names = ["/".join(parts[-length:]) for parts in absolute]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def list_results(runs: Sequence[ComparedRun]) -> list[TableRow]:
    """What the runs came to. Losses at different steps are told apart: the last step that all have is a row."""
    rows = [
        _row("state", runs, lambda run: run.status.state),
        _row("steps", runs, lambda run: f"{run.summary.step:,} of {run.summary.last_step:,}"),
        _row("tokens trained on", runs, lambda run: f"{run.summary.num_tokens:,}"),
        _row(f"training loss, mean of the last {RECENT_STEPS} steps", runs, _format_training_loss),
        _row("validation loss, the last", runs, lambda run: _format_validation(run.summary.last_loss)),
        _row("validation loss, the best", runs, lambda run: _format_validation(run.summary.best_loss)),
    ]
    common = find_common_validation(runs)
    if common is not None:
        rows.append(_row(f"validation loss at step {common:,}", runs, lambda run: _format_at(run, common)))
    rows += [
        _row("tokens/s in the steps", runs, _format_throughput),
        _row("MFU in the steps", runs, lambda run: NOTHING if run.summary.mfu is None else f"{run.summary.mfu:.1%}"),
        _row("time of all starts", runs, _format_time),
        _row("skipped updates", runs, lambda run: f"{run.summary.num_skipped:,}"),
    ]
    return rows


def find_common_validation(runs: Sequence[ComparedRun]) -> int | None:
    """The last step at which every run was evaluated; None if there is none."""
    common = set(runs[0].curves.validation.steps.tolist())
    for run in runs[1:]:
        common &= set(run.curves.validation.steps.tolist())
    return max(common, default=None)


def list_differences(configs: Sequence[Config]) -> list[TableRow]:
    """The keys that are not the same in all configs, in the order of the recipe."""
    first, *others = configs
    found: dict[str, list[str]] = {}  # key -> its value in each config so far
    for place, config in enumerate(others, start=1):
        for key, before, now in find_config_differences(first, config):
            values = found.setdefault(key, [_format_setting(before)] * len(configs))
            values[place] = _format_setting(now)
    return [TableRow(key, values) for key, values in found.items() if key not in NOT_COMPARED]


def describe_rows(first: Path, other: Path) -> str:
    """Whether two runs trained on the same rows, as `smoltrain verify` says it; or why nobody can say."""
    try:
        return str(compare_row_histories(read_row_history(first), read_row_history(other)))
    except UserError as error:
        return f"{first} and {other}: their rows cannot be compared ({error.problems[0]})"


def format_comparison(comparison: RunComparison) -> list[str]:
    """The comparison as text: a table of results, one of keys, and what their rows say."""
    labels = [run.label for run in comparison.runs]
    lines = format_rows([TableRow("", labels), *comparison.results])
    lines += ["", *_describe_differences(comparison, labels)]
    for run, verdict in zip(comparison.runs[1:], comparison.verdicts, strict=True):
        lines += ["", f"rows of {labels[0]} and {run.label}:", *(f"  {line}" for line in verdict.splitlines())]
    return lines


def _describe_differences(comparison: RunComparison, labels: list[str]) -> list[str]:
    if not comparison.differences:
        return ["their configs are the same, but for name and folder"]
    return ["their configs differ in", *format_rows([TableRow("", labels), *comparison.differences])]


def format_rows(rows: Sequence[TableRow]) -> list[str]:
    """Rows in aligned columns."""
    table = [[row.name, *row.cells] for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines: list[str] = []
    for name, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return lines


# ---- cells


def _row(name: str, runs: Sequence[ComparedRun], describe: Callable[[ComparedRun], str]) -> TableRow:
    return TableRow(name, [describe(run) for run in runs])


def _format_training_loss(run: ComparedRun) -> str:
    losses = run.curves.training.losses[-RECENT_STEPS:]
    return f"{np.mean(losses):.4f}" if len(losses) else NOTHING


def _format_validation(found: tuple[int, float] | tuple[int, float, float] | None) -> str:
    """Of (step, loss, ...)."""
    return NOTHING if found is None else f"{found[1]:.4f} at {found[0]:,}"


def _format_at(run: ComparedRun, step: int) -> str:
    loss = run.curves.validation.loss_at(step)
    return NOTHING if loss is None else f"{loss:.4f}"


def _format_throughput(run: ComparedRun) -> str:
    summary = run.summary
    return f"{summary.num_tokens / summary.step_s:,.0f}" if summary.step_s else NOTHING


def _format_time(run: ComparedRun) -> str:
    times = run.summary.times
    return NOTHING if times is None else format_seconds(times.wall_s)


def _format_setting(value: Any) -> str:
    """A value of a config, short enough for a table, without the secrets of URLs."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return value if isinstance(value, str) and len(value) <= 40 and value.isprintable() else format_value(value)
