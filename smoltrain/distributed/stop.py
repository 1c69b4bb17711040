"""Does this rank have a reason to stop: a signal, or a launcher that is gone?

A launcher that dies can signal nobody any more, and ranks that nobody watches would train on for ever. What stands
above a rank is looked at once a second, as processes and their parents. Smaller ways do not keep that promise under
every launcher (tests/distributed/test_stop.py, tests/whole_runs/test_signals.py):
- PR_SET_PDEATHSIG is Linux only, is about the parent alone, and tells a dead parent and a signal not apart. DeepSpeed's
  launcher stands under a runner, and a signal to the runner ends nothing but the runner.
- A pipe that ends with the launcher is something that a foreign launcher would have to hold open.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import psutil

from smoltrain.distributed.peers import leave_peers
from smoltrain.errors import INTERRUPTED, STOPPED

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SIGINT_ECHO_S = 0.5  # launchers pass on a Ctrl-C that the terminal has sent to their ranks already: no second one
LAUNCHER_POLL_S = 1.0  # between two looks at whether the launchers live
DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"


def heeded_stop_signals() -> tuple[signal.Signals, ...]:
    """What asks this process to stop; not SIGHUP where it is ignored, as `nohup` has it, and children inherit."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (number == signal.SIGHUP and ignores_hangup))


class StopFlag:
    """Remembers that this rank was asked to stop; the ranks add their flags up in each step.

    Some launchers signal their ranks one after another, seconds apart, so no rank may act on its own flag alone. A rank
    whose launcher has died will never be signalled: that counts as a request.

    Until `listen` there is nothing to lose: a signal just ends the process, and so does a launcher's death, without
    which the ranks might wait for each other for ever.

    A run inside somebody's program, a notebook's say, does not own its process: signals are the program's business
    until `listen` and after `close`, a second SIGINT is a KeyboardInterrupt, and what is no SIGINT is raised again by
    `close`: SIGTERM ends the program once the run has saved. Only in Python's main thread can such a flag listen.
    """

    def __init__(self, *, owns_process: bool = True) -> None:
        self.reason: str | None = None
        self._owns_process = owns_process
        self._program_handlers: dict[int, Any] = {}  # of a process that is not owned, while this flag listens
        self._first_interrupt_s: float | None = None  # of the monotonic clock
        self._next_look_s = 0.0  # for launchers, likewise
        self._listening = threading.Event()
        # A bare `nohup python` has no launcher and may outlive its shell.
        self._launchers = _find_launcher_links() if owns_process and "LOCAL_RANK" in os.environ else []
        self._signals = heeded_stop_signals()
        if owns_process:
            for number in self._signals:
                signal.signal(number, signal.SIG_DFL)
        if self._launchers:
            threading.Thread(target=self._exit_with_launcher, name="launcher", daemon=True).start()

    def listen(self) -> None:
        """From here on a request raises the flag instead of ending the process."""
        self._listening.set()
        if not self._owns_process and threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals:
            before = signal.signal(number, self._on_signal)
            self._program_handlers.setdefault(number, before)  # a rewind listens again

    def close(self) -> None:
        """Give the signals back to the program that this run is a part of."""
        for number, handler in self._program_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's own
        self._program_handlers.clear()
        for number in self._signals:
            if self.reason == number.name and number != signal.SIGINT:
                signal.raise_signal(number)

    def is_raised(self) -> bool:
        """Whether this rank has a reason to stop. Looks at its launchers, at most once a second."""
        if self.reason is None and time.monotonic() >= self._next_look_s:  # a look costs 0.1 ms, steps may be short
            self._next_look_s = time.monotonic() + LAUNCHER_POLL_S
            if self._is_launcher_gone():
                self.reason = "its launcher is gone"
        return self.reason is not None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_interrupt_s is None:
            self._first_interrupt_s = now
        elif now - self._first_interrupt_s > SIGINT_ECHO_S:
            if not self._owns_process:
                raise KeyboardInterrupt
            leave_peers(INTERRUPTED)
            os._exit(INTERRUPTED)  # the second Ctrl-C: leave at once; a checkpoint in the making stays a .tmp

    def _exit_with_launcher(self) -> None:
        while not self._listening.wait(LAUNCHER_POLL_S):
            if self._is_launcher_gone():
                leave_peers(STOPPED)
                os._exit(STOPPED)

    def _is_launcher_gone(self) -> bool:
        """Whether one of those that would pass a signal on is gone."""
        return any(_parent_pid(child) != parent for child, parent in self._launchers)


def _find_launcher_links() -> list[tuple[int, int | None]]:
    """(process, its parent) from this rank upwards: links that hold as long as all of its launchers live.

    `smoltrain train` (SMOLTRAIN_SUPERVISOR is its process) is all that stands above its ranks, torchrun too; above
    DeepSpeed's launcher there is its runner. None stands for the parent of a process that was an orphan before anybody
    looked.
    """
    if supervisor := os.environ.get("SMOLTRAIN_SUPERVISOR"):
        return [(os.getpid(), int(supervisor))]
    links: list[tuple[int, int | None]] = []
    child = os.getpid()
    while True:
        parent = _parent_pid(child)
        words = _command_line(parent)
        adopted = parent == 1 and sys.argv[0] not in " ".join(words).split()  # launchers name what they launch
        links.append((child, None if adopted else parent))
        if DEEPSPEED_LAUNCHER not in words:
            return links
        child = parent


def _parent_pid(pid: int) -> int:
    """The process id of a process's parent; -1 if the process is gone."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return -1


def _command_line(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []
