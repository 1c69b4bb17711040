"""How far a long preparation is: a bar on a terminal, a line now and then through a pipe."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.redact import redact_text
from smoltrain.terminal import EDGE, can_draw, hide_live_line, open_console, print_text

REPORT_INTERVAL_S = 10.0  # between lines
POLL_INTERVAL_S = 0.5

ProgressState = Callable[[], tuple[str, float]]  # what is done, in words, and which share of the work it is


@contextlib.contextmanager
def report_progress(state: ProgressState | None, health: ReaderHealth) -> Iterator[None]:
    """While the block runs, a thread prints how far it is (without `state` it does not) and the notes of `health`."""
    has_bar = state is not None and can_draw(open_console())
    with hide_live_line(), _progress_bar() if has_bar else contextlib.nullcontext() as bar:
        ended = threading.Event()
        thread = threading.Thread(target=_report_until, args=(ended, state, health, bar), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _report_until(
    ended: threading.Event, state: ProgressState | None, health: ReaderHealth, bar: Progress | None
) -> None:
    task = bar.add_task(state()[0], total=1.0) if bar and state else None
    reported_at = time.monotonic()
    while not ended.wait(POLL_INTERVAL_S):
        for note in health.take_notes():
            line = redact_text(f"data: {note}")
            if bar:
                print_text(line, bar.console)  # above the bar
            else:
                print_text(line)
        if state is None:
            continue
        if bar and task is not None:
            words, share = state()
            bar.update(task, description=words, completed=share)
        elif time.monotonic() >= reported_at + REPORT_INTERVAL_S:
            reported_at = time.monotonic()
            words, _ = state()
            print(f"data: {words} so far", flush=True)


def _progress_bar() -> Progress:
    """One that is gone when the work is done."""
    words = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (BarColumn(12), TaskProgressColumn(), TimeRemainingColumn(), words)
    console = open_console()
    console.width -= EDGE
    return Progress(SpinnerColumn(), *columns, expand=True, console=console, transient=True)
