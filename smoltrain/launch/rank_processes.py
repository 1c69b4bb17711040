"""The processes of one launch: they are started, watched, told of signals, and none of them outlives it.

No launcher stands between: signals reach all ranks at once, and every exit code is seen.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import psutil
import torch
from rich.console import Console

from smoltrain.console import TERMINAL_VARIABLE
from smoltrain.distributed.awake_clock import AwakeClock
from smoltrain.distributed.memory_limits import MAXRSS_UNIT
from smoltrain.distributed.rendezvous import RankPlace, open_rendezvous_socket
from smoltrain.distributed.stop import STOP_SIGNALS
from smoltrain.distributed.world import environment_without_launcher
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED, Problem
from smoltrain.launch.config_pipe import pack_start
from smoltrain.launch.killed_rank import KilledRank, KillWatch, explain_killed_rank
from smoltrain.launch.rank import START_ON_STDIN
from smoltrain.launch.signal_forwarder import SignalForwarder, describe_signal
from smoltrain.launch.terminal_loan import TerminalLoan
from smoltrain.terminal import clear_live_line, interrupt_live_line, open_console
from smoltrain.training.start import Start

RANK_COMMAND = [sys.executable, "-u", "-P", "-m", "smoltrain.launch.rank"]  # -P: no module of the current folder
POLL_S = 0.02  # between two looks at the ranks
MAX_POLL_GAP_S = 3.0  # between two such looks, if this process was not suspended
NOTICE_S = 15.0  # for ranks to notice that another one has died; rank.py lets rank 0 speak first, for 5 s
GRACE_S = 35.0  # from SIGTERM to SIGKILL, to save or to finish an upload


@dataclass(frozen=True)
class RankExit:
    """How a rank ended: `code` is its exit code, or -N if signal N ended it."""

    rank: int
    code: int
    evidence: str = ""  # that the kernel ended it for want of memory
    peak_bytes: int = 0  # its largest resident set, as the kernel tells it

    @property
    def launch_code(self) -> int:
        """The exit code (errors.py) of the whole command, if this rank was the first to end without being done."""
        if -self.code in STOP_SIGNALS:  # see StopFlag: only before the first step, when there is nothing to lose
            return STOPPED
        return self.code if self.code in (BAD_INPUT, STOPPED, INTERRUPTED) else FAULT

    def __str__(self) -> str:
        if self.code >= 0:
            return f"rank {self.rank} ended with code {self.code}"
        name = next((known.name for known in signal.Signals if known == -self.code), f"signal {-self.code}")
        return f"rank {self.rank} was ended by {name}"


class RankProcesses:
    """One launch of the ranks: start, pass signals on, wait, leave nothing behind.

    They train what `start` says, which they read from stdin: recipe and DeepSpeed's JSON may have been edited since the
    command read them. `words` then only tell who looks at the list of processes what runs. Rank 0 inherits `lock`, the
    open file by which this run is locked.
    """

    def __init__(
        self, words: list[str], count: int, device: str, start: Start | None = None, lock: int | None = None
    ) -> None:
        self._input = b"" if start is None else pack_start(start)
        mark = [] if start is None else [START_ON_STDIN]
        self._command = [*RANK_COMMAND, *mark, *words]
        self._inherited = () if lock is None else (lock,)
        self._env = environment_without_launcher() | {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "SMOLTRAIN_SUPERVISOR": str(os.getpid()),
        }
        if device != "cuda":
            self._env["DS_ACCELERATOR"] = device
        self._count = count
        self._start = start
        self._device = device
        self._processes: list[subprocess.Popen[bytes]] = []
        self._terminal: TerminalLoan | None = None

    def run(self, signals: SignalForwarder) -> RankExit | None:
        """The first rank that ended without being done, None if all were done. Nothing of them is alive afterwards."""
        signals.pending = []
        signals.ranks_were_started = True
        signals.list_processes = self.session_processes
        try:
            self._start_processes()
            return self._wait_for_exits(signals.pending, signals.console)
        finally:
            self._end_leftovers()
            signals.pending = None
            signals.list_processes = list

    def explain_kill(self, killed: RankExit) -> Problem | str | RankExit:
        """The line about a rank that the kernel ended for want of memory, whose page this writes."""
        if self._start is None:
            return killed
        device = torch.device(self._device)
        held = KilledRank(killed.rank, killed.evidence, killed.peak_bytes)
        return explain_killed_rank(held, self._count, self._start, device)

    def session_processes(self) -> list[psutil.Process]:
        """The living processes of the ranks' sessions: they and whatever they have started."""
        return _find_session_processes({process.pid for process in self._processes})

    def _start_processes(self) -> None:
        """A Ctrl-C is held back until all are there; each lets it in when Python could not answer with a traceback."""
        listener = open_rendezvous_socket(
            RankPlace(size=self._count, local_size=self._count)
        )  # so that nobody takes the port
        terminal = self._terminal = TerminalLoan(f"starting {self._count} rank{'s' * (self._count > 1)}")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which children inherit
        try:
            for rank in map(str, range(self._count)):
                env = self._env | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": str(listener.getsockname()[1])}
                env[TERMINAL_VARIABLE] = str(terminal.inherited)
                inherited: tuple[int, ...] = (terminal.inherited,)
                if rank == "0":
                    env["SMOLTRAIN_LISTENER"] = str(listener.fileno())
                    inherited += (listener.fileno(), *self._inherited)
                process = subprocess.Popen(
                    self._command, env=env, stdin=subprocess.PIPE, start_new_session=True, pass_fds=inherited
                )
                self._processes.append(process)
                assert process.stdin is not None
                # One that has ended is seen in _wait_for_exits.
                with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                    pipe.write(self._input)
        finally:
            listener.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _wait_for_exits(self, pending: list[int], console: Console | None = None) -> RankExit | None:
        """Until all have ended; after the first that died the others are asked, and at last made, to end too."""
        running = dict(enumerate(self._processes))
        first: RankExit | None = None
        clock = AwakeClock(MAX_POLL_GAP_S)
        due: list[tuple[float, int]] = []  # when to send which signal
        kills = KillWatch()
        while running:
            time.sleep(POLL_S)
            if self._terminal:
                self._terminal.poll()
            while pending:
                self._pass_signal_on(pending.pop(0), console or open_console())
            exits = self._collect_exits(running)
            if not exits:
                kills.note_count(clock.now())
            failed = [rank_exit for rank_exit in exits if rank_exit.code != DONE]
            if first is None and failed:
                # Who has lost a dead one says FAULT: the dead one itself tells more.
                first = min(failed, key=lambda rank_exit: (rank_exit.code == FAULT, rank_exit.code))
                first = replace(first, evidence=kills.find_evidence(first.code))
                due = _schedule_signals(first, clock.now())
            while due and clock.now() >= due[0][0]:
                _, number = due.pop(0)
                self._send_signal(number)
        return first

    def _collect_exits(self, running: dict[int, subprocess.Popen[bytes]]) -> list[RankExit]:
        """Those that have ended since the last look; they are taken out of `running`."""
        exits = []
        for rank, process in list(running.items()):
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)  # as process.poll, which tells no memory
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                exits.append(RankExit(rank, process.returncode, peak_bytes=usage.ru_maxrss * MAXRSS_UNIT))
                del running[rank]
        return exits

    def _pass_signal_on(self, number: int, console: Console) -> None:
        """Send it, and say at once that it came: the ranks may be in the middle of a long step."""
        self._send_signal(number)
        text = describe_signal(number, has_started=self._terminal is not None and self._terminal.is_taken)
        interrupt_live_line(text, console)

    def _send_signal(self, number: int) -> None:
        for process in self._processes:
            if process.returncode is None:  # process.send_signal would take the exit from _collect_exits
                os.kill(process.pid, number)

    def _end_leftovers(self) -> None:
        """Nothing outlives the launch: what is left in the sessions of the ranks is asked, then made, to end."""
        clock = AwakeClock(MAX_POLL_GAP_S)
        left = self.session_processes()
        asked: set[int] = set()
        while left:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    if clock.now() > GRACE_S:
                        process.kill()
                    elif process.pid not in asked:
                        asked.add(process.pid)
                        process.terminate()
            time.sleep(POLL_S)
            left = self.session_processes()
        if self._terminal:
            self._terminal.close()
        clear_live_line(open_console())


def _schedule_signals(first: RankExit, now: float) -> list[tuple[float, int]]:
    """When to send which signal to the others, who may wait for the one that ended for ever."""
    if first.launch_code == STOPPED:
        if first.code == STOPPED:  # by agreement of all
            return []
        return [(now, signal.SIGTERM), (now + GRACE_S, signal.SIGKILL)]
    return [(now + NOTICE_S, signal.SIGTERM), (now + NOTICE_S + GRACE_S, signal.SIGKILL)]


def _find_session_processes(sessions: set[int]) -> list[psutil.Process]:
    """The living processes of these sessions."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
