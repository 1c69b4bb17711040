"""The terminal: lines that fit its width, and one line at the bottom that moves while something goes on.

Several processes write to one terminal: the command, its ranks, and the terminal itself, which echoes ^C. What keeps
them apart is that a moving line is never higher than one line and never reaches the right edge: whoever else has
something to say erases it and writes in its place (`interrupt_live_line`), and the next redraw follows below.

Through a pipe nothing moves, and nothing is cut or wrapped: every text is one whole line, whatever COLUMNS says.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

REDRAWS_PER_S = 8
EDGE = 3  # cells that a moving line leaves free, for the ^C that a terminal echoes must not wrap either
SPINNER_CELLS = 2  # with the space behind it
WARNING_STYLE = "yellow"
ERASE_LINE = "\r\x1b[2K"
SHOW_CURSOR = "\x1b[?25h"

# A model may write what a terminal or a page would obey: controls are shown as their pictures, turns of direction as
# U+FFFD.
CONTROL_PICTURES = (
    {i: 0x2400 + i for i in range(0x20) if chr(i) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
)

_shown: list["LiveLine"] = []  # in this process; the last one is drawn, those before it wait


def open_console(file: TextIO | None = None) -> Console:
    """A console as smoltrain uses it: texts are printed as they are. By default stdout's, as it is at that time."""
    return Console(file=file, highlight=False, markup=False, emoji=False)


def is_terminal(console: Console) -> bool:
    """Whether its lines are to fit a width: not so for a pipe that FORCE_COLOR has asked colours for."""
    forced_by_color = "FORCE_COLOR" in os.environ and os.environ.get("TTY_COMPATIBLE") != "1"
    return console.is_terminal and (not forced_by_color or console.file.isatty())


def can_draw(console: Console) -> bool:
    """Whether a line may move there: on a terminal that obeys, which TERM=dumb does not."""
    return is_terminal(console) and console.is_interactive


# ---- lines that fit


class Column(NamedTuple):
    """A part of a line that may be left out: the highest `rank` first, 0 never."""

    text: str
    rank: int = 0


def fit_columns(columns: list[Column], width: int | None, separator: str = "  ") -> str:
    """The columns in one line of at most so many cells; those that matter least are left out. None: all of them."""
    kept = list(columns)
    while True:
        line = separator.join(column.text for column in kept)
        least = max(kept, key=lambda column: column.rank)
        if width is None or cell_len(line) <= width or least.rank == 0:
            return line
        kept.remove(least)


def wrap_words(text: str, width: int, indent: int = 0) -> list[str]:
    """Lines of at most so many cells, broken between words; all but the first are indented.

    A word that is longer than a line is broken where the line ends.
    """
    console = Console(width=width, color_system=None)
    lines: list[str] = []
    for paragraph in text.expandtabs(4).split("\n"):
        first = Text(paragraph).wrap(console, width)[0].plain.rstrip() if paragraph else ""
        rest = Text(paragraph[len(first) :].lstrip())
        lines.append(first)
        if rest:
            lines += [" " * indent + line.plain.rstrip() for line in rest.wrap(console, max(1, width - indent))]
    return lines


def replace_control_characters(line: str) -> str:
    """A line without control characters, which a model may sample, or a file's name have, and a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line)


def show_control_characters(text: str, file: TextIO) -> str:
    """A model's text as it may be written there: what a terminal would obey is shown; elsewhere it is as it is."""
    return text.translate(CONTROL_PICTURES) if file.isatty() else text


def print_text(text: str, console: Console | None = None, *, style: str = "", indent: int = 0) -> None:
    """Print sentences: wrapped between words on a terminal, whole lines through a pipe. Warnings have a colour."""
    console = console or open_console()
    text = "\n".join(map(replace_control_characters, text.split("\n")))
    lines = wrap_words(text, console.width, indent) if is_terminal(console) else [text]
    if not style and text.startswith("WARNING"):
        style = WARNING_STYLE
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)


# ---- one line that moves


class LiveLine:
    """A line at the bottom of the terminal that is drawn again and again; nothing where it may not be drawn.

    What is printed meanwhile by this process stands above it. A line that is started while another one is shown takes
    its place until it stops.
    """

    def __init__(self, console: Console, render: Callable[[int], RenderableType]) -> None:
        """`render` gets the number of cells there are, and returns what is one line high."""
        self._console = console
        self._render = render
        self._live: Live | None = None

    def start(self) -> None:
        """Show it."""
        if self in _shown or not can_draw(self._console):
            return
        if _shown:
            _shown[-1].hide()
        _shown.append(self)
        self._draw()

    def stop(self) -> None:
        """Erase it; the one before is shown again."""
        if self not in _shown:
            return
        was_last = _shown[-1] is self
        _shown.remove(self)
        self.hide()
        if was_last and _shown:
            _shown[-1]._draw()

    def hide(self) -> None:
        """Erase it for now."""
        if self._live:
            self._live.stop()
        self._live = None

    def refresh(self) -> None:
        """Draw it now."""
        if self._live:
            self._live.refresh()

    def _draw(self) -> None:
        self._live = Live(
            get_renderable=lambda: self._render(max(1, self._console.width - EDGE)), console=self._console,
            refresh_per_second=REDRAWS_PER_S, transient=True,
        )  # fmt: skip
        self._live.start(refresh=True)


@contextlib.contextmanager
def hide_live_line() -> Iterator[None]:
    """While the block runs, the line that this process shows is not drawn: something else is."""
    hidden = _shown[-1] if _shown else None
    if hidden:
        hidden.hide()
    try:
        yield
    finally:
        if hidden and _shown and _shown[-1] is hidden:
            hidden._draw()


@contextlib.contextmanager
def show_activity(text: str) -> Iterator[None]:
    """While the block runs, a terminal shows what is being done, and that it is."""
    console = open_console()
    line = LiveLine(console, ActivityLine(console, text))
    line.start()
    try:
        yield
    finally:
        line.stop()


class ActivityLine:
    """A spinner, what is being done, and for how long if it is long: to be rendered by a LiveLine."""

    def __init__(self, console: Console, text: str) -> None:
        self._spinner = make_spinner(console)
        self._text = text
        self._began_s = time.monotonic()

    def __call__(self, width: int) -> RenderableType:
        """One line of at most so many cells."""
        took_s = time.monotonic() - self._began_s
        text = f"{self._text} ...{f' {took_s:.0f} s' if took_s >= 2 else ''}"
        return lay_out_line([self._spinner], text, width - SPINNER_CELLS)


def lay_out_line(parts: Sequence[RenderableType], text: str, room: int) -> RenderableType:
    """A line that moves: a spinner, perhaps a bar, then a text of at most `room` cells."""
    line = Text(text, no_wrap=True)
    line.truncate(max(1, room), overflow="ellipsis")
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(*parts, line)
    return row


def make_spinner(console: Console) -> Spinner:
    """One that the terminal has the characters for."""
    return Spinner("dots" if console.encoding.startswith("utf") else "line", style="cyan")


def interrupt_live_line(text: str, console: Console) -> None:
    """Print a line although another process may be drawing its own on this terminal: in one write, in its place."""
    erase = ERASE_LINE if can_draw(console) else ""
    console.file.write(f"{erase}{text}\n")
    console.file.flush()


def clear_live_line(console: Console) -> None:
    """What a process that was stopped while it drew has left behind: half a line, and no cursor.

    Past the buffers, as this may be called in the middle of a print.
    """
    if can_draw(console):
        with contextlib.suppress(OSError):
            os.write(console.file.fileno(), (ERASE_LINE + SHOW_CURSOR).encode())
