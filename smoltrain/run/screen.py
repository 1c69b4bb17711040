"""What rank 0 shows on the console: lines, and on a terminal a bar below them, which moves while anything goes on.

On a terminal every line fits the width. A step's line leaves out what matters least, in this order: wait, memory,
tokens so far, time left, MFU, learning rate, gradient norm, tokens/s, phase; step and loss stay. Sentences wrap between
words; a sample is cut to SAMPLE_LINES. Through a pipe each text is one whole line with all of its columns: logs are
searched, not looked at. The width is asked for anew with every line, as windows are resized.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from smoltrain.estimate.horizon import format_count
from smoltrain.run.axis_ticks import format_clock
from smoltrain.terminal import (
    SPINNER_CELLS,
    Column,
    LiveLine,
    fit_columns,
    is_terminal,
    lay_out_line,
    make_spinner,
    open_console,
    print_text,
    replace_control_characters,
    wrap_words,
)

LABEL_CELLS = 22  # of what was chosen; the choice stands beside it
MIN_CHOICE_CELLS = 34  # a terminal with less room for it has the choice wrapped below
SAMPLE_LINES = 4
ACTIVITY_CELLS = 10  # so that the bar keeps its length while something else is done
BAR_CELLS = (6, 24)  # at least and at most; with less room there is none

PHASE_STYLE = "bold cyan"
BEST_STYLE = "green"


class Screen:
    """Prints on a console, above a bar if that is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or open_console()
        self._bar = Bar(self._console)
        self._line = LiveLine(self._console, self._bar.render)

    @property
    def width(self) -> int | None:
        """Cells of a line; None through a pipe, where lines may have any length."""
        return self._console.width if is_terminal(self._console) else None

    def say(self, text: str) -> None:
        """A sentence. Warnings, which begin with that word, have a colour."""
        print_text(text, self._console)

    def say_choice(self, what: str, value: str) -> None:
        """What was chosen beside its name; on a terminal the rest of a long one stands below its beginning."""
        indent = LABEL_CELLS + 1
        if self.width and self.width < indent + MIN_CHOICE_CELLS:
            indent = 4
        print_text(format_choice(what, value), self._console, indent=indent)

    def say_phase(self, text: str) -> None:
        """That a phase begins."""
        print_text(text, self._console, style=PHASE_STYLE)

    def say_summary(self, text: str) -> None:
        """Several lines; those that are indented are commands to be copied, or rows of a table, and stay whole."""
        for line in text.splitlines():
            if line.startswith(" "):
                self._console.print(Text(line), soft_wrap=True)
            else:
                self.say(line)

    def say_step(self, step: int, last_step: int, phase: str, metrics: Mapping[str, Any], left_s: float | None) -> None:
        """The numbers of a step."""
        print_text(format_step_line(step, last_step, phase, metrics, left_s, self.width), self._console)

    def say_validation(self, step: int, loss: float, perplexity: float, bits_per_byte: float, best: float) -> None:
        """The loss on the held-out rows; `best` is the lowest one of the run before, infinite if there was none."""
        line = format_validation_line(step, loss, perplexity, bits_per_byte, best, self.width)
        print_text(line, self._console, style=BEST_STYLE if loss < best else "")

    def say_sample(self, step: int, text: str, file: str) -> None:
        """The beginning of what the model wrote; `file` has it all."""
        lines = [f"sample at step {step}:", *cut_sample(text, self.width, file)]
        self._console.print(Text("\n".join(lines)), soft_wrap=True)

    # ---- the bar

    def start_bar(self, done: int, last_step: int) -> None:
        """From here on a terminal has a bar."""
        self._bar.step = done
        self._bar.last_step = last_step
        self._line.start()

    def show_step(self, step: int, phase: str, metrics: Mapping[str, Any], left_s: float | None) -> None:
        """Move the bar. Between two redraws this costs next to nothing."""
        self._bar.activity = ""
        self._bar.step = step
        self._bar.phase = phase
        self._bar.metrics = metrics
        self._bar.left_s = left_s

    @contextlib.contextmanager
    def show_activity(self, activity: str) -> Iterator[None]:
        """While the block runs the bar says that no step is trained but this is done."""
        before = self._bar.activity
        self._bar.activity = activity
        self._line.refresh()
        try:
            yield
        finally:
            self._bar.activity = before

    def close(self) -> None:
        """Erase the bar."""
        self._line.stop()


@dataclass
class Bar:
    """One line: a spinner, the phase or what else is done, how far it is, the numbers of the last step."""

    console: Console
    step: int = 0
    last_step: int = 1
    phase: str = ""
    activity: str = "starting"
    metrics: Mapping[str, Any] | None = None
    left_s: float | None = None

    def __post_init__(self) -> None:
        self._spinner = make_spinner(self.console)

    def render(self, width: int) -> RenderableType:
        """At most so many cells. What matters least is left out: MFU, tokens/s, loss, what is done; then the bar."""
        room = width - SPINNER_CELLS
        columns = [
            Column(f"{self.activity or self.phase:<{ACTIVITY_CELLS}}", 1),
            Column(f"{self.step}/{self.last_step}"),
            *self._number_columns(),
            Column(f"left {_format_duration(self.left_s)}"),
        ]
        text = fit_columns(columns, room)
        bar_cells = min(room - cell_len(text) - 1, BAR_CELLS[1])
        parts: list[RenderableType] = [self._spinner]
        if bar_cells >= BAR_CELLS[0]:
            parts.append(ProgressBar(total=self.last_step, completed=self.step, width=bar_cells))
        return lay_out_line(parts, text, room)

    def _number_columns(self) -> list[Column]:
        metrics = self.metrics or {}
        columns = []
        if "train/loss_nats_per_token" in metrics:
            columns.append(Column(f"loss {metrics['train/loss_nats_per_token']:.4f}", 2))
        if "speed/tokens_per_s" in metrics:
            columns.append(Column(f"{metrics['speed/tokens_per_s']:,.0f} tok/s", 3))
        if "speed/mfu" in metrics:
            columns.append(Column(f"MFU {metrics['speed/mfu']:.1%}", 4))
        return columns


def format_choice(what: str, value: str) -> str:
    """One line on what was chosen."""
    return f"{what:<{LABEL_CELLS}} {value}"


def format_step_line(
    step: int, last_step: int, phase: str, metrics: Mapping[str, Any], left_s: float | None, width: int | None = None
) -> str:
    """The numbers of one step for a person, in at most so many cells; None: all of them."""
    columns = [
        Column(f"step {step:>{len(str(last_step))}}/{last_step}"),
        Column(f" {phase}", 1),
        Column(f"  loss {metrics['train/loss_nats_per_token']:.4f}"),
        Column(f"  lr {metrics['train/lr']:.2e}", 4),
        Column(f"  grad {metrics['train/grad_norm_before_clipping']:.3f}", 3),
        Column(f"  {metrics['speed/tokens_per_s']:,.0f} tok/s", 2),
    ]
    if "speed/mfu" in metrics:
        columns.append(Column(f"  MFU {metrics['speed/mfu']:.1%}", 5))
    if "data/tokens" in metrics:
        columns.append(Column(f"  {format_count(metrics['data/tokens'])} tokens", 7))
    columns += [
        Column(f"  mem {metrics['memory/peak_gib']:.2f} GiB", 8),
        Column(f"  wait {metrics['speed/data_wait_share']:.1%}", 9),
        Column(f"  left {_format_duration(left_s)}", 6),
    ]
    return fit_columns(columns, width, separator="")


def format_validation_line(
    step: int, loss: float, perplexity: float, bits_per_byte: float, best: float, width: int | None = None
) -> str:
    """A validation for a person, in at most so many cells; perplexity is left out first, then bits per byte."""
    columns = [
        Column(f"validation at step {step}: loss {loss:.4f}"),
        Column(f"perplexity {perplexity:,.1f}", 2),
        Column(f"{bits_per_byte:.3f} bits per byte", 1),
    ]
    if loss < best:
        columns.append(Column("the best so far"))
    elif math.isfinite(best):  # else no loss before was a number
        columns.append(Column(f"best {best:.4f}"))
    return fit_columns(columns, width, separator=", ")


def format_task_line(step: int, task: str, metrics: Mapping[str, float]) -> str:
    """The metrics of a task for a person, each with its standard error."""
    parts: list[str] = []
    for name, value in metrics.items():
        if not name.endswith("_stderr"):
            error = metrics.get(f"{name}_stderr")
            parts.append(f"{name} {value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    return f"{task} at step {step}: {', '.join(parts)}"


def cut_sample(text: str, width: int | None, file: str) -> list[str]:
    """The first lines of a text, indented and without control characters, and how many more there are in `file`."""
    lines: list[str] = []
    for line in text.splitlines():
        clean = replace_control_characters(line).rstrip()
        lines += wrap_words(clean, max(1, width - 4)) if width else [clean]
    shown = [f"    {line}".rstrip() for line in lines[:SAMPLE_LINES]]
    num_left = len(lines) - SAMPLE_LINES
    if num_left > 0:
        shown.append(f"    ... {num_left} more line{'s' * (num_left > 1)} in {file}")
    return shown


def _format_duration(seconds: float | None) -> str:
    """1:02:03 or 2:03; ? where it is not known."""
    return "?" if seconds is None or not math.isfinite(seconds) else format_clock(seconds)
