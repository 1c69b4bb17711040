"""TODO: moved out of world.py."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import psutil

from smoltrain.errors import INTERRUPTED, STOPPED

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SIGINT_ECHO_S = 0.5  # launchers pass on a Ctrl-C that the terminal has sent to their ranks already: no second one
LAUNCHER_POLL_S = 1.0  # between two looks at whether the launchers live
DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"


def heeded_stop_signals() -> tuple[signal.Signals, ...]:
    """What asks this process to stop; not SIGHUP where it is ignored, as `nohup` has it, and children inherit."""
    ignores = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (number == signal.SIGHUP and ignores))


class StopFlag:
    """Remembers that this rank was asked to stop; the loop adds the flags of all ranks up at each step.

    Some launchers signal their ranks one after another, seconds apart, so no rank may act on its own flag alone. A rank
    whose launcher has died will never be signalled: that counts as a request. As torchrun hides the exit codes of its
    ranks, a request is also noted in the file that SMOLTRAIN_ASKED names, if it names one (launch/slurm.sbatch).

    Until `is_raised` is asked for the first time there is nothing to lose: a signal just ends the process, and so does
    a launcher's death, without which the ranks might wait for each other for ever.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._interrupted = 0.0  # when, in seconds of the monotonic clock
        self._next_look = 0.0  # for launchers, likewise
        self._listening = threading.Event()
        self._noted = "SMOLTRAIN_ASKED" not in os.environ
        # A bare `nohup python` has no launcher and may outlive its shell.
        self._launchers = _find_launcher_links() if "LOCAL_RANK" in os.environ else []
        self._signals = heeded_stop_signals()
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)
        if self._launchers:
            threading.Thread(target=self._exit_with_launcher, name="launcher", daemon=True).start()

    def _exit_with_launcher(self) -> None:
        while not self._listening.wait(LAUNCHER_POLL_S):
            if self._is_launcher_gone():
                self._touch_request_file()
                os._exit(STOPPED)

    def _is_launcher_gone(self) -> bool:
        """Whether one of those that would pass a signal on is gone."""
        return any(_parent_pid(child) != parent for child, parent in self._launchers)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now - self._interrupted > SIGINT_ECHO_S:
                os._exit(INTERRUPTED)  # the second Ctrl-C: leave at once; a checkpoint in the making stays a .tmp
            self._interrupted = self._interrupted or now

    def is_raised(self) -> bool:
        """Whether this rank has a reason to stop."""
        if not self._listening.is_set():
            self._listening.set()
            for number in self._signals:
                signal.signal(number, self._on_signal)
        if not self.reason and time.monotonic() >= self._next_look:  # a look costs 0.1 ms, and steps may be short
            self._next_look = time.monotonic() + LAUNCHER_POLL_S
            self.reason = "its launcher is gone" if self._is_launcher_gone() else ""
        if self.reason:
            self._touch_request_file()
        return bool(self.reason)

    def _touch_request_file(self) -> None:
        if not self._noted:
            self._noted = True
            with contextlib.suppress(OSError):
                Path(os.environ["SMOLTRAIN_ASKED"]).touch()


def _find_launcher_links() -> list[tuple[int, int | None]]:
    """(process, its parent) from this rank upwards: links that hold as long as all of its launchers live.

    `smoltrain train` (SMOLTRAIN_SUPERVISOR is its process) is all that stands above its ranks. DeepSpeed's launcher
    stands under a runner, and a signal to the runner ends nothing but the runner. None stands for the parent of a
    process that was an orphan before anybody looked.
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
