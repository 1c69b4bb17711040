"""What a run has come to, out of its folder: losses, tokens, where the time went, and the commands that come next.

Time is counted from each start's beginning to its last line in metrics.jsonl, so that nobody's night between two starts
is in it. Steps that were done again (after a kill, or a rewind) took time too: their lines are in metrics.undone.jsonl.
"""

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltrain.checkpoint.manifest import list_checkpoint_steps
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.load import read_run_config
from smoltrain.errors import Problem, UserError
from smoltrain.files import METRICS_FILE, read_jsonl
from smoltrain.run.axis_ticks import format_clock
from smoltrain.run.run_warnings import SLOW_NETWORK_SHARE, communication_share
from smoltrain.run.time_left import (
    CLOSING_S,
    EVALUATION_S,
    MEMORISATION_S,
    PAUSE_S,
    SAMPLING_S,
    START_S,
    STEP_S,
    TASK_EVALUATION_S,
)
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.schedule import Plan

VALIDATION_LOSS = "validation/loss_nats_per_token"
# What a line of metrics.jsonl says of its own time, by the name that the summary has for it.
PARTS = {
    "starting": START_S,
    "steps": STEP_S,
    "evaluation": EVALUATION_S,
    "tasks": TASK_EVALUATION_S,
    "memorisation": MEMORISATION_S,
    "sampling": SAMPLING_S,
    "saving": PAUSE_S,
    "closing": CLOSING_S,
}
SUMMED_UP = {
    "step", "time_s", *PARTS.values(), VALIDATION_LOSS, "validation/bits_per_byte", "speed/tokens_per_s", "speed/mfu",
    "data/epochs", "train/skipped_updates", "speed/communication_s", "speed/communication_mb",
}  # fmt: skip
REPEATED = "steps done again"
OTHER = "other"  # looking at gradients, logs, publishing between steps
LABEL_WIDTH = 18


@dataclass(frozen=True)
class RunTimes:
    """Where the time of all starts went."""

    parts: Mapping[str, float]  # seconds by name; together they are the wall clock
    num_starts: int
    num_steps: int  # that they trained and that still count
    num_tokens: int  # targets of those

    @property
    def wall_s(self) -> float:
        """Seconds from each start's beginning to its last line, all starts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class RunSummary:
    """A run so far. Losses in nats per token."""

    folder: Path
    step: int  # that is done
    last_step: int  # of the plan
    last_loss: tuple[int, float, float] | None  # step, loss, bits per byte of the last validation
    best_loss: tuple[int, float] | None  # step, loss of the best one
    num_steps: int  # in metrics.jsonl: fewer than `step` where the run went on from another one
    num_tokens: int  # targets of these steps, all ranks
    step_s: float  # seconds of these steps
    mfu: float | None  # over the time of the steps that have it
    num_epochs: float | None  # None where the data have no number of rows
    num_skipped: int  # updates
    network_share: float  # of the steps' time; 0 on one rank
    sent_mb: float  # by a rank in a step, the last one
    times: RunTimes | None  # None of an older run, which did not write them down


def summarise_run(plan: Plan, folder: Path) -> RunSummary:
    """Read a run's records. Errors: UserError for records that cannot be read at all."""
    lines = [keep_summed_up(line) for line in read_jsonl(folder / METRICS_FILE)]
    return summarise_lines(plan, folder, lines)


def keep_summed_up(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary needs of a line of metrics.jsonl: a third of it."""
    return {name: value for name, value in line.items() if name in SUMMED_UP}


def summarise_lines(plan: Plan, folder: Path, lines: list[dict[str, Any]]) -> RunSummary:
    """The summary of these lines of metrics.jsonl, and of those of steps that were done again. Errors: UserError."""
    undone = [keep_summed_up(line) for line in read_jsonl(folder / UNDONE_METRICS_FILE)]
    steps = [line for line in lines if STEP_S in line]
    step_s = sum(line[STEP_S] for line in steps)
    validations = [(line["step"], line[VALIDATION_LOSS]) for line in lines if VALIDATION_LOSS in line]
    finite = [(step, loss) for step, loss in validations if math.isfinite(loss)]
    with_mfu = [line for line in steps if "speed/mfu" in line]
    mfu_s = sum(line[STEP_S] for line in with_mfu)
    last = steps[-1] if steps else {}
    return RunSummary(
        folder=folder,
        step=last.get("step", 0),
        last_step=plan.last_step,
        last_loss=_find_last_validation(lines),
        best_loss=min(finite, key=lambda pair: pair[1], default=None),
        num_steps=len(steps),
        num_tokens=_count_tokens(steps),
        step_s=step_s,
        mfu=sum(line["speed/mfu"] * line[STEP_S] for line in with_mfu) / mfu_s if mfu_s else None,
        num_epochs=last.get("data/epochs"),
        num_skipped=last.get("train/skipped_updates", 0),
        network_share=communication_share(steps),
        sent_mb=last.get("speed/communication_mb", 0.0),
        times=_add_up_times(lines, undone),
    )


def _find_last_validation(lines: list[dict[str, Any]]) -> tuple[int, float, float] | None:
    for line in reversed(lines):
        if VALIDATION_LOSS in line:
            return line["step"], line[VALIDATION_LOSS], line.get("validation/bits_per_byte", math.nan)
    return None


def _count_tokens(steps: Iterable[Mapping[str, Any]]) -> int:
    """Targets of these steps, all ranks."""
    return sum(round(line["speed/tokens_per_s"] * line[STEP_S]) for line in steps)


def order_by_time(lines: list[dict[str, Any]], undone: list[dict[str, Any]]) -> list[tuple[dict[str, Any], bool]]:
    """(line, whether its step was done again) of all lines with a time, as they were written.

    A crash while lines were set aside leaves some of them twice: these count once, as of steps that stand.
    """
    told = {json.dumps(line): (line, True) for line in undone}
    told |= {json.dumps(line): (line, False) for line in lines}
    return sorted((pair for pair in told.values() if "time_s" in pair[0]), key=lambda pair: pair[0]["time_s"])


def _add_up_times(lines: list[dict[str, Any]], undone: list[dict[str, Any]]) -> RunTimes | None:
    """Where the time of all starts went that say when they began; None if none does.

    What lies before the first of them is of an older version, and is left out.
    """
    parts = dict.fromkeys((*PARTS, REPEATED, OTHER), 0.0)
    wall_s = began_at = ended_at = 0.0
    num_starts = 0
    kept: list[dict[str, Any]] = []
    for line, is_undone in order_by_time(lines, undone):
        spent = {part: line[name] for part, name in PARTS.items() if name in line}
        if "starting" in spent:
            wall_s += ended_at - began_at
            num_starts += 1
            began_at = line["time_s"] - sum(spent.values())
        elif not num_starts:
            continue
        ended_at = line["time_s"]
        if STEP_S in line and not is_undone:
            kept.append(line)
        for part, seconds in spent.items():
            parts[REPEATED if is_undone and part == "steps" else part] += seconds
    if not num_starts:
        return None
    wall_s += ended_at - began_at
    parts[OTHER] = max(0.0, wall_s - sum(parts.values()))
    return RunTimes(parts, num_starts, len(kept), _count_tokens(kept))


# ---- in print


def describe_run_folder(folder: Path) -> str:
    """The summary of a run by its folder alone. Errors: UserError if it has trained no step, or has no valid config."""
    if not (folder / METRICS_FILE).exists():
        saw = f"no step in {folder / METRICS_FILE}"
        raise UserError(Problem("there is nothing to sum up yet", saw, "a run that trained", "RUN"))
    return describe_run(Plan(read_run_config(folder / CONFIG_FILE).phases), folder)


def describe_run(plan: Plan, folder: Path) -> str:
    """The summary and the commands that come next.

    Every line fits 80 columns, as far as the folder's name lets it. Errors: those of `summarise_run`.
    """
    summary = summarise_run(plan, folder)
    return "\n".join([*format_summary(summary), *_list_next_commands(summary, plan)])


def format_summary(summary: RunSummary) -> list[str]:
    """Lines of at most 80 columns, the folder's name aside."""
    rows = _describe_losses(summary)
    epochs = f", {summary.num_epochs:,.2f} epochs" if summary.num_epochs is not None else ""
    rows.append(("tokens", f"{summary.num_tokens:,} in {summary.num_steps:,} steps{epochs}"))
    if summary.step_s:
        rows += _describe_speed(summary)
    if summary.network_share:
        rows += _describe_network(summary)
    if summary.num_skipped:
        rows.append(("skipped updates", f"{summary.num_skipped:,}"))
    rows.append(("time", _describe_time(summary)))
    if summary.times:
        for part, seconds in summary.times.parts.items():
            if seconds:
                share = seconds / summary.times.wall_s
                rows.append((f"  {part}", f"{format_seconds(seconds):>9} {share:6.1%}"))
    rows.append(("weights, metrics", str(summary.folder)))
    if (summary.folder / "plots").is_dir():
        rows.append(("curves", str(summary.folder / "plots")))
    done = f"done: {summary.step:,} of {summary.last_step:,} steps"
    return [done, *(f"  {label:<{LABEL_WIDTH}} {value}" for label, value in rows)]


def _describe_losses(summary: RunSummary) -> list[tuple[str, str]]:
    """(label, text) of the last validation, and of the best one if that is another."""
    if summary.last_loss is None:
        return [("validation loss", "never measured")]
    step, loss, bits_per_byte = summary.last_loss
    best_step, best_loss = summary.best_loss or (step, loss)
    is_best = ", the best" if summary.best_loss and best_step == step else ""
    rows = [("validation loss", f"{loss:.4f} nats per token at step {step:,}{is_best}")]
    if best_step != step:
        rows.append(("  the best", f"{best_loss:.4f} nats per token at step {best_step:,}"))
    if math.isfinite(bits_per_byte):
        rows.append(("  bits per byte", f"{bits_per_byte:.3f} at step {step:,}"))
    return rows


def _describe_speed(summary: RunSummary) -> list[tuple[str, str]]:
    """(label, text) of the steps' speed beside that of the whole time, and of MFU."""
    text = f"{summary.num_tokens / summary.step_s:,.0f} in the steps"
    if summary.times and summary.times.wall_s:
        text += f", {summary.times.num_tokens / summary.times.wall_s:,.0f} over all the time"
    return [("tokens/s", text), *([("MFU", f"{summary.mfu:.1%} in the steps")] if summary.mfu is not None else [])]


def _describe_network(summary: RunSummary) -> list[tuple[str, str]]:
    """(label, text) of what communication took, with a warning where that is much."""
    sent = f"{summary.sent_mb:,.1f} MB sent by a rank in a step"
    rows = [("communication", f"{summary.network_share:.1%} of the steps, {sent}")]
    if summary.network_share > SLOW_NETWORK_SHARE:
        rows.append(("  WARNING", "much: more rows per step, or see `smoltrain check-hosts`"))
    return rows


def _describe_time(summary: RunSummary) -> str:
    times = summary.times
    if times is None:
        steps = format_seconds(summary.step_s)
        return f"{steps} in the steps; older versions wrote down no other"
    starts = f"{times.num_starts} start{'s' * (times.num_starts > 1)}"
    left_out = summary.num_steps - times.num_steps
    older = f"; {left_out:,} steps of an older version are not in it" if left_out else ""
    return f"{format_seconds(times.wall_s)} in {starts}{older}"


def format_seconds(seconds: float) -> str:
    """3.2 s, 12:07 or 3:12:07."""
    return f"{seconds:.1f} s" if seconds < 100 else format_clock(seconds)


def _list_next_commands(summary: RunSummary, plan: Plan) -> list[str]:
    """What to do with a run: commands that a shell can be given as they are, and how it goes on."""
    command = _find_program("smoltrain")
    folder = shlex.quote(str(summary.folder))
    lines = ["next:"]
    if list_checkpoint_steps(summary.folder / "checkpoints"):
        lines += [f"  {command} generate {folder} --prompt 'To be'", f"  {command} export {folder}"]
    if list(summary.folder.glob("wandb/offline-run-*")):
        lines.append(f"  {_find_program('wandb')} sync {folder}/wandb/offline-run-*")
    left = summary.last_step - summary.step
    if left > 0:
        is_end = summary.step > 0 and plan.ends_phase(summary.step)
        stopped = ", without run.stop_after" if is_end else ""  # else a signal or an error ended it
        lines.append(f"  to go on with the other {left:,} steps: the same command{stopped}")
    else:
        lines.append("  to train longer: one more phase in the recipe, and the same command again")
    return lines


def _find_program(name: str) -> str:
    """How a shell calls a program of this environment: by its name where that is the one that it finds."""
    path = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if found and Path(found) == path else shlex.quote(os.path.relpath(path))
