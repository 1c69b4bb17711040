"""A fresh set of rank processes for each phase, started and watched here: what `./train.sh` does after set-up.

Where to begin, whether the run may go on and its data are looked at here, once (train/start.py), and handed to the
ranks. Each phase restores from disk on every rank, so a checkpoint that could not be restored would be found at once.
No launcher stands between: signals reach all ranks at once, and every exit code is seen.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType

import psutil
import torch
from rich.console import Console

from smoltrain.config.load import load_config, stop_after_phase
from smoltrain.config.schema import Config, PhaseSection
from smoltrain.console import TERMINAL_VARIABLE
from smoltrain.distributed.awake_clock import AwakeClock
from smoltrain.distributed.memory_limits import MAXRSS_UNIT
from smoltrain.distributed.rendezvous import RankPlace, open_rendezvous_socket
from smoltrain.distributed.stop import STOP_SIGNALS, heeded_stop_signals
from smoltrain.distributed.world import choose_device, environment_without_launcher
from smoltrain.engine.deepspeed_json import read_deepspeed_text, remember_deepspeed_text
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED, Problem, UserError
from smoltrain.launch.config_pipe import pack_start
from smoltrain.launch.killed_rank import KilledRank, KillWatch, explain_killed_rank
from smoltrain.launch.rank import START_ON_STDIN
from smoltrain.launch.terminal_loan import TerminalLoan
from smoltrain.run.run_lock import lock_run_folder, unlock_run_folder
from smoltrain.run.screen import Screen
from smoltrain.run.summary import describe_run
from smoltrain.schedule import Phase, Plan
from smoltrain.terminal import clear_live_line, interrupt_live_line, open_console, show_activity
from smoltrain.train.start import Start, begin_run

RANK_COMMAND = [sys.executable, "-u", "-P", "-m", "smoltrain.launch.rank"]  # -P: no module of the current folder
CPU_RANKS = 2  # on a machine without a GPU: enough to make every collective real
POLL_S = 0.02  # between two looks at the ranks
MAX_POLL_GAP_S = 3.0  # between two such looks, if this process was not suspended
NOTICE_S = 15.0  # for ranks to notice that another one has died; rank.py lets rank 0 speak first, for 5 s
GRACE_S = 35.0  # from SIGTERM to SIGKILL, to save or to finish an upload


def supervise_run(recipe: str, overrides: list[str], ranks: int | None = None, began_at: float | None = None) -> int:
    """Run every phase that is left; returns the exit code (errors.py).

    The command began at `began_at` (seconds since 1970), now by default.
    Errors: UserError before any process starts, for whatever can be known by then.
    """
    return supervise_config(lambda: load_config(recipe, overrides), [recipe, *overrides], ranks, began_at)


def supervise_config(
    read_config: Callable[[], Config], words: list[str], ranks: int | None = None, began_at: float | None = None,
    terminal: Console | None = None,
) -> int:  # fmt: skip
    """The same for a config that a program has made; `words` name it in the list of processes.

    `terminal` is where a person sees what a signal does, if stdout leads elsewhere; by default stdout.
    """
    signals = SignalForwarder(terminal)
    screen = Screen()
    with contextlib.ExitStack() as held:
        held.callback(signals.close)
        try:
            return _run_phases(read_config(), words, ranks, signals, screen, held, began_at)
        except StopRequested:
            if signals.ranks_were_started:
                screen.say("stopped; the same command goes on from there")
            else:
                screen.say("stopped before the first step; nothing was lost")
            return STOPPED


def _run_phases(
    config: Config, words: list[str], num_ranks: int | None, signals: "SignalForwarder", screen: Screen,
    held: contextlib.ExitStack, began_at: float | None,
) -> int:  # fmt: skip
    remember_deepspeed_text(config.engine.ds_config, read_deepspeed_text(config.engine.ds_config))  # for all phases
    device = choose_device(config.engine.device)
    num_ranks = choose_num_ranks(num_ranks, device.type)
    lock = lock_run_folder(config)  # until this command and the last rank have ended
    held.callback(unlock_run_folder, lock)
    with show_activity("looking at checkpoints and data"):
        start = begin_run(config, num_ranks, device, say=screen.say, one_phase=True, began_at=began_at)
    plan = start.plan  # in steps, which the recipe may not be: only begin_run resolves it
    last_step = plan.last_step_until(config.run.stop_after)
    if not start.has_work:
        screen.say(f"{config.run.name}: the plan is complete at step {start.point.step}; nothing to do")
        return DONE
    first_phase = plan.phase(start.last_step)
    for phase in plan.phases:
        if phase.last < first_phase.last or phase.last > last_step:
            continue
        if phase != first_phase:
            part = stop_after_phase(config, phase.name)
            with show_activity("looking at what was saved"):
                start = begin_run(part, num_ranks, device, say=screen.say, data_ready=True, before=start)
        work = f"{_describe_work(start, phase)}, {start.num_ranks} new processes"
        screen.say_phase(f"phase {phase.name}: {work}")
        if changes := describe_phase_changes(plan, phase):
            screen.say_choice("new in this phase", changes)
        shown = [*words, f"run.stop_after={phase.name}"]
        code = _launch_ranks(RankProcesses(shown, start.num_ranks, device.type, start, lock), signals)
        if code == DONE and signals.stop_signal:  # too late for the ranks, which had left their last step behind
            screen.say(f"stopped after step {phase.last} ({signals.stop_signal}); the same command goes on from there")
            return STOPPED
        if code != DONE:
            return code
    screen.say_summary(describe_run(plan, config.run_folder))
    return DONE


def _describe_work(start: Start, phase: Phase) -> str:
    """What this start will do in a phase."""
    done = start.point.step
    return f"steps {max(done + 1, phase.first)} to {phase.last}" if done < phase.last else "its last validation"


def describe_phase_changes(plan: Plan, phase: Phase) -> str:
    """What is trained otherwise than in the phase before; empty for the first one."""
    number = plan.phases.index(phase)
    if number == 0:
        return ""
    before = plan.phases[number - 1].spec
    told = ("schedule", "lr", "weight_decay", "mix")
    changes = [
        f"{name} {_format_setting(before, name)} -> {_format_setting(phase.spec, name)}"
        for name in told
        if getattr(before, name) != getattr(phase.spec, name)
    ]
    if phase.spec.optimizer_state == "reset":
        changes.append("the optimizer's state begins at zero")
    return ", ".join(changes)


def _format_setting(spec: PhaseSection, name: str) -> str:
    value = getattr(spec, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _launch_ranks(ranks: "RankProcesses", signals: "SignalForwarder") -> int:
    """One set of ranks from start to end: their exit code, and a word to the user where they could not give one."""
    first = ranks.run(signals)
    screen = Screen()
    if signals.num_interrupts > 1:
        screen.say("left at once; the same command goes on from the last checkpoint")
        return INTERRUPTED
    if first is None:
        return DONE
    if first.launch_code == STOPPED != first.code:
        screen.say("stopped, and nothing was lost; the same command goes on from there")
    if first.launch_code == FAULT:
        what = ranks.explain_kill(first) if first.evidence else first
        print(f"error: {what}; the same command goes on from the last checkpoint", file=sys.stderr)
    return first.launch_code


def choose_num_ranks(asked: int | None, device: str) -> int:
    """All GPUs, or two ranks on a CPU, or what was asked for. Errors: UserError for a count the machine lacks."""
    gpus = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, 0)
    if asked is None:
        return gpus or CPU_RANKS
    if asked < 1 or (gpus and asked > gpus):
        want = f"1 to {gpus}, one for each GPU" if gpus else "1 or more"
        raise UserError(Problem("this machine cannot run so many ranks", str(asked), want, "--ranks"))
    return asked


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
        self.ranks: RankProcesses | None = None  # those that Ctrl-Z stops too
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
        processes = self.ranks.session_processes() if self.ranks else []
        _signal_processes(processes, signal.SIGSTOP)
        clear_live_line(self.console)  # the shell's prompt comes here
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # here this process stands still, until `fg` or `bg`
        signal.signal(number, self._on_ctrl_z)
        _signal_processes(processes, signal.SIGCONT)


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
        signals.pending, signals.ranks_were_started, signals.ranks = [], True, self
        try:
            self._start_processes()
            return self._wait_for_exits(signals.pending, signals.console)
        finally:
            self._end_leftovers()
            signals.pending = signals.ranks = None

    def explain_kill(self, killed: RankExit) -> "Problem | str | RankExit":
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

    def _collect_exits(self, running: "dict[int, subprocess.Popen[bytes]]") -> list[RankExit]:
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


def describe_signal(number: int, *, has_started: bool) -> str:
    """What a signal that has just been passed on to the ranks will do; `has_started`: they say what they do."""
    if number == signal.SIGKILL:
        return "leaving at once"
    what = "stopping after this step, then saving" if has_started else "stopping; no step has begun"
    if number == signal.SIGINT:
        return f"{what}; Ctrl-C again leaves at once"
    return f"{signal.Signals(number).name}: {what}"


def _schedule_signals(first: RankExit, now: float) -> list[tuple[float, int]]:
    """When to send which signal to the others, who may wait for the one that ended for ever."""
    if first.launch_code == STOPPED:
        if first.code == STOPPED:  # by agreement of all
            return []
        return [(now, signal.SIGTERM), (now + GRACE_S, signal.SIGKILL)]
    return [(now + NOTICE_S, signal.SIGTERM), (now + NOTICE_S + GRACE_S, signal.SIGKILL)]


def _signal_processes(processes: list[psutil.Process], number: int) -> None:
    """A signal to those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _find_session_processes(sessions: set[int]) -> list[psutil.Process]:
    """The living processes of these sessions."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
