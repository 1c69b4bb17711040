"""`smoltrain runs`: a table of all runs of a folder, a row for each."""

import json
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.text import Text

from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.errors import Problem, UserError
from smoltrain.monitor.run_status import RunStatus, read_all_statuses
from smoltrain.terminal import is_terminal, open_console, replace_control_characters, wrap_words

STATE_STYLES = {"running": "green", "waiting": "cyan", "failed": "red", "stopped": "yellow", "done": ""}
HEADINGS = ("run", "state", "step", "loss", "validation", "tokens/s", "last sign")
RIGHT_ALIGNED = (2, 3, 4, 5, 6)
DROPPED_FIRST = (5, 4, 6, 3)  # columns that a narrow terminal has no room for
GAP = "  "
MIN_NAME_CELLS = 12  # to which a name is cut before a column is left out
NOTE_INDENT = 4


def print_runs(runs: Path, *, is_default: bool, as_json: bool) -> None:
    """Print the table, or JSON. Errors: UserError for a folder that is not there, unless it is the default one."""
    if not runs.is_dir() and not is_default:
        raise UserError(Problem("there is no such folder", str(runs), "a folder of runs", "the FOLDER argument"))
    if (runs / CONFIG_FILE).is_file():
        summary = f"`smoltrain summary {shlex.quote(str(runs))}`"
        want = f"a folder of runs, as {runs.absolute().parent}; {summary} tells of this one"
        raise UserError(Problem("this is a run", str(runs), want, "the FOLDER argument"))
    statuses = read_all_statuses(runs)
    if as_json:
        print(json.dumps([status.to_json() for status in statuses], indent=1))
        return
    console = open_console()
    if not statuses:
        print(f"no runs under {runs}/ yet; `smoltrain train` begins one")
        return
    width = console.width if is_terminal(console) else None
    for line in format_runs(statuses, time.time(), width):
        console.print(line, soft_wrap=True)


def format_runs(statuses: Sequence[RunStatus], now_s: float, width: int | None) -> list[Text]:
    """The table in lines of at most so many cells, notes below their run; None: a whole line for each run."""
    rows = [format_row(status, now_s) for status in statuses]
    kept = list(range(len(HEADINGS)))
    if width is not None:
        longest_name = max(cell_len(row[0]) for row in rows)
        name_room = max(0, longest_name - MIN_NAME_CELLS)
        for column in DROPPED_FIRST:
            if _measure_table(rows, kept) - name_room > width:
                kept.remove(column)
        too_wide = max(0, _measure_table(rows, kept) - width)
        for row in rows:
            row[0] = _cut(row[0], max(MIN_NAME_CELLS, longest_name - too_wide))
    widths = _column_widths(rows)
    lines = [Text(_join_cells(HEADINGS, widths, kept), style="bold")]
    for status, row in zip(statuses, rows, strict=True):
        text = _join_cells(row, widths, kept)
        note = replace_control_characters(status.note)
        if width is None:
            lines.append(Text(f"{text}{GAP}{note}".rstrip()))
            continue
        line = Text(text)
        start = text.index(status.state, len(row[0]))
        line.stylize(STATE_STYLES[status.state], start, start + len(status.state))
        lines.append(line)
        if note:
            for part in wrap_words(note, max(8, width - NOTE_INDENT)):
                lines.append(Text(f"{' ' * NOTE_INDENT}{part}", style="dim"))
    return lines


def format_row(status: RunStatus, now_s: float) -> list[str]:
    """The cells of a run, in the order of HEADINGS."""
    steps = f"{status.step:,}" if status.last_step is None else f"{status.step:,}/{status.last_step:,}"
    validation = "-"
    if status.validation_loss is not None:
        validation = f"{status.validation_loss:.4f} at {status.validation_step:,}"
    return [
        replace_control_characters(status.name),
        status.state,
        steps,
        "-" if status.loss is None else f"{status.loss:.4f}",
        validation,
        "-" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}",
        "-" if status.last_sign_at is None else format_age(now_s - status.last_sign_at),
    ]


def format_age(seconds: float) -> str:
    """How long ago something was: 5 s ago, 3 min ago, 12 days ago. A clock that goes ahead gives 0 s."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(0.0, seconds)
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(cell_len(cell) for cell in column) for column in zip(HEADINGS, *rows, strict=True)]


def _measure_table(rows: Sequence[Sequence[str]], kept: Sequence[int]) -> int:
    """Cells of a line with these columns."""
    widths = _column_widths(rows)
    return sum(widths[column] for column in kept) + len(GAP) * (len(kept) - 1)


def _join_cells(cells: Sequence[str], widths: Sequence[int], kept: Sequence[int]) -> str:
    parts: list[str] = []
    for column in kept:
        padding = " " * (widths[column] - cell_len(cells[column]))
        parts.append(padding + cells[column] if column in RIGHT_ALIGNED else cells[column] + padding)
    return GAP.join(parts).rstrip()


def _cut(text: str, cells: int) -> str:
    """A name of at most so many cells; the end of a longer one is left out, which is shown."""
    cut = Text(text)
    cut.truncate(cells, overflow="ellipsis")
    return cut.plain
