"""Ranks that a step has no rows for wait until the others have trained, and leave with the same exit code.

A launcher that starts one rank on each device of three hosts, as torchrun does when a fourth is lost, cannot know that
the rows of a step divide among two or four alone; and a rank that left early would end all others with it.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from smoltrain.distributed.meeting import READ_TIMEOUT_S, poll_until
from smoltrain.errors import DONE, STOPPED

END, SEEN = "training/end", "training/end/seen"
STOP_PATIENCE_S = 20.0  # torchrun kills a rank 30 s after its signal; the ranks that train leave long before, mostly


def await_training(store: Any, is_stop_asked: Callable[[], bool]) -> int:
    """Wait until rank 0 says how it ended: its exit code.

    A signal that reaches this rank alone ends nobody's training: it leaves some seconds later. Where the store is gone,
    so is rank 0, and everybody has heard why (peers.py).
    """
    deadline: float | None = None
    ended = False

    def is_over() -> bool:
        nonlocal deadline, ended
        ended = store.check([END])
        if deadline is None and is_stop_asked():
            deadline = time.monotonic() + STOP_PATIENCE_S
        return ended or (deadline is not None and time.monotonic() > deadline)

    code = DONE
    with contextlib.suppress(RuntimeError):
        poll_until(is_over)
        code = int(store.get(END)) if ended else STOPPED
        store.add(SEEN, 1)
    return code


def end_idle_ranks(store: Any, code: int, num_idle: int) -> None:
    """Rank 0: all have trained. It waits a moment for the idle ones, as the store may be this process's."""
    with contextlib.suppress(RuntimeError):  # torchrun's store, which torchrun's death has taken along
        store.set(END, str(code))
        deadline = time.monotonic() + READ_TIMEOUT_S
        while store.add(SEEN, 0) < num_idle and time.monotonic() < deadline:
            time.sleep(0.01)
