"""The watchdog's own watchdog, a small process beside each rank: it ends one whose interpreter runs no thread any more.

Native code that never gives the interpreter's lock back stops the watchdog's thread as well. A timer of the rank itself
could not tell this from having been suspended; here every tick counts as one, however long it lasted.
    python -I -S backstop.py LIMIT_S < (a pipe in which the watchdog's thread leaves a byte now and then)
"""

import contextlib
import os
import select
import signal
import sys
from pathlib import Path

TICK_S = 0.5


def end_silent_process(limit_s: float) -> None:
    """Wait until the pipe is closed; end the rank if nothing came through it for `limit_s` seconds."""
    rank = os.getppid()
    silence = 0.0
    while silence < limit_s:
        if select.select([0], [], [], TICK_S)[0]:
            if not os.read(0, 4096):
                return  # the watch is closed
            silence = 0.0
        elif not is_process_stopped(rank):
            silence += TICK_S
    os.write(2, f"error: process {rank} hangs in native code for {silence:.0f} s and is ended; its stacks:\n".encode())
    if os.getppid() == rank:
        os.kill(rank, signal.SIGABRT)  # on which faulthandler writes the stacks


def is_process_stopped(process: int) -> bool:
    """Whether a signal, or a debugger, holds it; False where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


if __name__ == "__main__":
    end_silent_process(float(sys.argv[1]))
