"""The signals that ask `smoltrain train` to stop: who gets them, and what a person at the terminal reads of it."""

import contextlib
import signal
from collections.abc import Callable
from types import FrameType

import psutil
from rich.console import Console

from smoltrain.distributed.stop import heeded_stop_signals
from smoltrain.terminal import clear_live_line, open_console


class StopRequested(BaseException):
    """A signal came while there were no ranks to pass it on to."""


class SignalForwarder:
    """The signals that ask this command to stop: the ranks get them, who save; without ranks the command just ends."""

    def __init__(self, terminal: Console | None = None) -> None:
        """`terminal` is the console of the person who sends them, stdout by default."""
        self._terminal = terminal
        self.pending: list[int] | None = None  # for the ranks, while there are any
        self.ranks_were_started = False  # whether there ever were any
        self.stop_signal = ""  # the name of the first one, which no phase may begin after
        self.num_interrupts = 0
        self.list_processes: Callable[[], list[psutil.Process]] = list  # those of the ranks, which Ctrl-Z stops too
        self._before = {number: signal.signal(number, self._on_signal) for number in heeded_stop_signals()}
        if signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN:  # as shells without job control leave it
            self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._on_ctrl_z)

    @property
    def console(self) -> Console:
        """Where to say what a signal does."""
        return self._terminal or open_console()

    def close(self) -> None:
        """Listen no longer."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.num_interrupts += number == signal.SIGINT
        self.stop_signal = self.stop_signal or signal.Signals(number).name
        if self.pending is None:
            raise StopRequested
        self.pending.append(signal.SIGKILL if self.num_interrupts > 1 else number)  # the second Ctrl-C: leave at once

    def _on_ctrl_z(self, number: int, _frame: FrameType | None) -> None:
        """The ranks are in sessions of their own, where a terminal's signals do not come."""
        processes = self.list_processes()
        _signal_processes(processes, signal.SIGSTOP)
        clear_live_line(self.console)  # the shell's prompt comes here
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # here this process stands still, until `fg` or `bg`
        signal.signal(number, self._on_ctrl_z)
        _signal_processes(processes, signal.SIGCONT)


def describe_signal(number: int, *, has_started: bool) -> str:
    """What a signal that has just been passed on to the ranks will do; `has_started`: they say what they do."""
    if number == signal.SIGKILL:
        return "leaving at once"
    what = "stopping after this step, then saving" if has_started else "stopping; no step has begun"
    if number == signal.SIGINT:
        return f"{what}; Ctrl-C again leaves at once"
    return f"{signal.Signals(number).name}: {what}"


def _signal_processes(processes: list[psutil.Process], number: int) -> None:
    """A signal to those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
