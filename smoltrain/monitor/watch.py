"""`smoltrain watch`: a run live in a terminal, in a process of its own that reads the run's files and writes nothing.

On a terminal the view is drawn again every second until the run ends, or Ctrl-C; it then stays on the screen. A run
that is not there yet is waited for. Through a pipe, and with `--once`, it is printed once.
"""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from rich.console import Console, Group, RenderableType
from rich.live import Live

from smoltrain.config.config_file import CONFIG_FILE, RUNS_FOLDER
from smoltrain.errors import Problem, UserError
from smoltrain.files import describe_error
from smoltrain.inference.find_run import find_run_of_recipe
from smoltrain.monitor.run_reader import RunReader
from smoltrain.monitor.run_status import list_run_folders
from smoltrain.monitor.watch_view import draw_view, draw_waiting
from smoltrain.terminal import can_draw, is_terminal, open_console

LOOK_EVERY_S = 1.0
PIPE_CELLS = 100  # of a line through a pipe
PIPE_LINES = 40


def watch_run(source: str, *, once: bool = False) -> None:
    """Show a run until it ends, or once. Errors: UserError where it is shown once and is not there."""
    console = open_console()
    is_file = Path(source).is_file()  # nothing that begins to be a run while somebody waits for it
    if is_file or once or not can_draw(console):
        folder = find_watched_folder(source)
        if folder is None:
            want = find_run_of_recipe(source) or describe_runs_there_are()
            raise UserError(Problem("no such run", repr(source), want, "the RUN argument"))
        _print_view(console, RunReader(folder))
        return
    watched = WatchedRun(source, console)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with Live(get_renderable=watched.render, console=console, screen=True, auto_refresh=False) as live:
            while not watched.has_ended:
                live.refresh()
                time.sleep(LOOK_EVERY_S)
    finally:  # the screen of before is back: what was seen last stays below it
        signal.signal(signal.SIGTERM, before)
        if watched.reader is not None:
            _print_view(console, watched.reader)


class WatchedRun:
    """A run that may not be there yet, drawn for the size that the terminal has at that time."""

    def __init__(self, source: str, console: Console) -> None:
        self._source = source
        self._console = console
        self.reader: RunReader | None = None

    @property
    def has_ended(self) -> bool:
        """Whether there is a run that nobody trains any more, or will in a moment."""
        return self.reader is not None and self.reader.state.state not in ("running", "waiting")

    def render(self) -> RenderableType:
        """The view of this moment."""
        width = self._console.width
        if self.reader is None:
            folder = find_watched_folder(self._source)
            if folder is None:
                return Group(*draw_waiting(self._source, describe_runs_there_are(), width))
            self.reader = RunReader(folder)
        return Group(*_draw_now(self.reader, width, self._console.height, braille=has_braille(self._console)))


def _leave(number: int, _frame: FrameType | None) -> None:
    """End by a signal, but only when the terminal has its own screen back."""
    sys.exit(128 + number)


def find_watched_folder(source: str) -> Path | None:
    """The folder of a run that has begun, or that somebody is starting; None before that."""
    for folder in (Path(source), RUNS_FOLDER / source):
        if (folder / CONFIG_FILE).is_file() or folder in list_run_folders(folder.parent):
            return folder
    return None


def describe_runs_there_are() -> str:
    """What may be watched."""
    names = ", ".join(folder.name for folder in list_run_folders(RUNS_FOLDER)) or "none yet"
    return f"the folder of a run, or a name under {RUNS_FOLDER}/ ({names})"


def has_braille(console: Console) -> bool:
    """Whether the terminal's encoding has the characters of a curve."""
    return console.encoding.lower().startswith("utf")


def _print_view(console: Console, reader: RunReader) -> None:
    """Print the view as it is now, where a terminal has the lines that were printed before."""
    width = console.width if is_terminal(console) else PIPE_CELLS
    lines = console.height - 1 if is_terminal(console) else PIPE_LINES
    for line in _draw_now(reader, width, lines, braille=has_braille(console)):
        console.print(line, soft_wrap=True)


def _draw_now(reader: RunReader, width: int, height: int, *, braille: bool) -> list[RenderableType]:
    now_s = time.time()
    trouble = ""
    try:
        reader.refresh(now_s)
    except OSError as error:  # of a network file system, say: the next look may do better
        trouble = describe_error(error)
    return [*draw_view(reader, now_s, width, height, braille=braille, trouble=trouble)]
