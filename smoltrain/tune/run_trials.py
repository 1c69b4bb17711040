"""Train the runs of a grid, one after another: each by the supervisor, as `smoltrain train` does, with its words in a
file. What is done is not done again, and what was begun goes on where it stands.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar

from smoltrain.config.schema import Config
from smoltrain.console import write_console_to
from smoltrain.data.documents.listing import list_all_sources
from smoltrain.data.tokens.index import data_index_file
from smoltrain.data.tokens.plan_preparation import choose_data_mode
from smoltrain.data.tokens.prepare import copy_prepared_data
from smoltrain.errors import BAD_INPUT, DONE, FAULT, TrainingStopped
from smoltrain.files import METRICS_FILE
from smoltrain.launch.supervisor import supervise_config
from smoltrain.monitor.tail import find_last_line
from smoltrain.run.run_lock import hold_run_lock
from smoltrain.run.summary import format_seconds
from smoltrain.run.time_left import STEP_S
from smoltrain.terminal import (
    SPINNER_CELLS,
    Column,
    LiveLine,
    fit_columns,
    lay_out_line,
    make_spinner,
    open_console,
    print_text,
)
from smoltrain.tune.grid import describe_point
from smoltrain.tune.trials import CACHE_FOLDER, Outcome, Trial, read_outcome, tuning_folder

CONSOLE_FILE = "console.log"  # in a run's logs/: what it would have printed
TAIL_BYTES = 2**15  # of metrics.jsonl, in which its newest step is
BAR_CELLS = 12
WIDE_CELLS = 70  # from which on there is room for a bar


def train_trials(trials: Sequence[Trial], ranks: int | None, words: list[str]) -> tuple[int, list[Outcome]]:
    """Train what is left; the exit code (errors.py), and the outcomes of all runs, or of those before it ended.

    `words` name the runs in the list of processes. A run that diverges is an outcome; one that fails otherwise ends
    the whole, after its error was shown.
    """
    pace = Pace(len(trials))
    outcomes: list[Outcome] = []
    for number, trial in enumerate(trials, 1):
        before = read_outcome(trial)
        if before is not None:
            _drop_checkpoints(trial)
            outcomes.append(before)
            say_outcome(number, len(trials), trial, before, None)
            pace.leave_out()
            continue
        _share_streamed_data(trial, trials)
        began_s = time.monotonic()
        code = _train_quietly(trial, f"{number}/{len(trials)}", pace, ranks, words)
        took_s = time.monotonic() - began_s
        outcome = read_outcome(trial)
        if code == FAULT and outcome is not None and outcome.diverged_at is not None:
            code = DONE
        if code == DONE and outcome is None:
            raise TrainingStopped(f"{trial.folder} ended without a validation loss; its output is in {_log_of(trial)}")
        if outcome is not None and code != FAULT:
            _drop_checkpoints(trial)
            outcomes.append(outcome)
            say_outcome(number, len(trials), trial, outcome, took_s)
        if code != DONE:
            _say_end(code, trial, len(outcomes), len(trials))
            return code, outcomes
        pace.add(took_s)
    return DONE, outcomes


def find_shared_cache(config: Config) -> Path | None:
    """Where the runs of a grid share their tokens; None where each streams, as the recipe's own run would.

    Errors: UserError for sources that cannot be listed.
    """
    if config.data.cache is not None:
        return config.data.cache
    mode, _ = choose_data_mode(config.data, list_all_sources(config))
    return tuning_folder(config) / CACHE_FOLDER if mode == "cached" else None


def _share_streamed_data(trial: Trial, trials: Sequence[Trial]) -> None:
    """What a run that streams would make before its first step, a trained tokenizer say, taken from another one."""
    if trial.config.data.cache is not None or data_index_file(trial.folder).exists():
        return
    for other in trials:
        is_alike = other.config.batch == trial.config.batch  # which the number of streams depends on
        if is_alike and data_index_file(other.folder).exists():
            copy_prepared_data(other.folder, trial.folder)
            return


def _train_quietly(trial: Trial, place: str, pace: "Pace", ranks: int | None, words: list[str]) -> int:
    """One run, from where it stands to its end; the exit code. Its words go to a file, a terminal has a moving line."""
    log = _log_of(trial)
    log.parent.mkdir(parents=True, exist_ok=True)
    with write_console_to(log) as screen:
        terminal = open_console(screen)
        line = LiveLine(terminal, TrialLine(terminal, trial, place, pace))
        output = sys.stdout
        errors = sys.stderr
        line.start()
        try:
            # Not above the line, where rich would have it.
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                named = [*words, f"run.folder={trial.config.run.folder}", f"run.name={trial.config.run.name}"]
                return supervise_config(lambda: trial.config, named, ranks, terminal=terminal)
        finally:
            line.stop()


def _drop_checkpoints(trial: Trial) -> None:
    """A run that ended needs none, and a grid of them would fill a disk."""
    checkpoints = trial.folder / "checkpoints"
    if checkpoints.exists():
        with hold_run_lock(trial.config):  # its ranks may be leaving, after a kill of the command
            shutil.rmtree(checkpoints)


def _log_of(trial: Trial) -> Path:
    return trial.folder / "logs" / CONSOLE_FILE


# ---- what is shown


class Pace:
    """How long a run takes, by those that were trained from their beginning to their end."""

    def __init__(self, num_runs: int) -> None:
        self._num_left = num_runs  # the one that trains now included
        self._times_s: list[float] = []
        self._began_s = time.monotonic()

    def add(self, took_s: float) -> None:
        """A run has ended."""
        self._times_s.append(took_s)
        self.leave_out()

    def leave_out(self) -> None:
        """A run need not be trained, or has ended."""
        self._num_left -= 1
        self._began_s = time.monotonic()

    def estimate_left_s(self, now_s: float) -> float | None:
        """Seconds to the end of the last run; None before one has ended."""
        if not self._times_s:
            return None
        return max(0.0, self._num_left * mean(self._times_s) - (now_s - self._began_s))


class TrialLine:
    """The moving line of a run: which one it is, how far, its loss, and how long all of them still take."""

    def __init__(self, console: Console, trial: Trial, place: str, pace: Pace) -> None:
        self._spinner = make_spinner(console)
        self._trial = trial
        self._place = place
        self._pace = pace

    def __call__(self, width: int) -> RenderableType:
        """At most so many cells."""
        metrics: dict[str, Any] = {}
        with contextlib.suppress(OSError):  # the next look may do better
            metrics = find_last_line(self._trial.folder / METRICS_FILE, f'"{STEP_S}"'.encode(), TAIL_BYTES) or {}
        step = metrics.get("step", 0)
        how_far = f"step {step}/{self._trial.steps}" if metrics else "starting"
        columns = [Column(self._place), Column(str(self._trial), 1), Column(how_far)]
        if metrics:
            columns.append(Column(f"loss {metrics['train/loss_nats_per_token']:.3f}", 2))
        left_s = self._pace.estimate_left_s(time.monotonic())
        if left_s is not None:
            columns.append(Column(f"left {format_seconds(left_s)}", 3))
        parts: list[RenderableType] = [self._spinner]
        room = width - SPINNER_CELLS
        if width >= WIDE_CELLS:
            parts.append(ProgressBar(total=self._trial.steps, completed=step, width=BAR_CELLS))
            room -= BAR_CELLS + 1
        return lay_out_line(parts, fit_columns(columns, room), room)


def say_outcome(number: int, count: int, trial: Trial, outcome: Outcome, took_s: float | None) -> None:
    """A line for a run that has ended; `took_s` is None for one that an earlier command has trained."""
    ended = f"loss {outcome.loss:.4f}"
    if outcome.diverged_at is not None:
        ended = f"diverged at step {outcome.diverged_at}"
    when = "trained before" if took_s is None else format_seconds(took_s)
    columns = [
        Column(f"{number:>{len(str(count))}}/{count}"),
        Column(describe_point(trial.point)),
        Column(f"seed {trial.seed}", 2),
        Column(ended),
        Column(f"{outcome.tokens_per_s:,.0f} tokens/s", 1),
        Column(when, 3),
    ]
    console = open_console()
    print_text(fit_columns(columns, console.width if console.is_terminal else None), console)


def _say_end(code: int, trial: Trial, num_done: int, num_all: int) -> None:
    """Why the command ends before its last run."""
    if code in (FAULT, BAD_INPUT):
        for line in list_last_errors(_log_of(trial)):
            print(line, file=sys.stderr)
        print(f"error: the run {trial.folder} failed; all it printed is in {_log_of(trial)}", file=sys.stderr)
    print_text(f"{num_done} of {num_all} runs are done; the same command goes on from there")


def list_last_errors(log: Path) -> Iterator[str]:
    """The lines of the last start that a run's output calls errors."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("phase ")]
    begin = starts[-1] if starts else 0
    for line in lines[begin:]:
        if line.startswith("error: "):
            yield line
