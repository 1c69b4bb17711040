"""How far a long preparation is: a bar on a terminal, a line now and then through a pipe."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from smoltrain.data.documents.retry import ReaderHealth
from smoltrain.redact import redact_text

REPORT_INTERVAL_S = 10.0  # between lines
POLL_INTERVAL_S = 0.5


@contextlib.contextmanager
def report_progress(state: Callable[[], tuple[str, float]] | None, health: ReaderHealth) -> Iterator[None]:
    """While the block runs, tell from a thread what `state` says (words, share of the work done) and `health` notes."""
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_progress_bar()) if state and Console().is_terminal else None
        task = bar.add_task("", total=1.0) if bar else None
        say = (lambda line: bar.console.print(line, markup=False)) if bar else (lambda line: print(line, flush=True))
        ended, said = threading.Event(), time.monotonic()

        def tell() -> None:
            nonlocal said
            while not ended.wait(POLL_INTERVAL_S):
                for note in health.take_notes():
                    say(redact_text(f"data: {note}"))
                if state and bar and task is not None:
                    words, share = state()
                    bar.update(task, description=words, completed=share)
                elif state and time.monotonic() >= said + REPORT_INTERVAL_S:
                    said = time.monotonic()
                    print(f"data: {state()[0]} so far", flush=True)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _progress_bar() -> Progress:
    return Progress(
        BarColumn(20), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")), expand=True,
        console=Console(highlight=False), transient=True,
    )  # fmt: skip
