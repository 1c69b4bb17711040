"""A fresh set of rank processes for each phase, started and watched here: what `./train.sh` does after set-up.

Each phase restores from disk on every rank, so a checkpoint that could not be restored would be found at once.
No launcher stands between: signals reach all ranks at once, and every exit code is seen.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import torch

from smoltrain import config, data, dist, ds_config, files, model, origin, runfolder
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED, Problem, UserError
from smoltrain.plan import Plan
from smoltrain.schema import Config, TransformersSection

SCRIPT = Path(__file__).parent.parent / "launch" / "train.py"
CPU_RANKS = 2  # on a machine without a GPU: enough to make every collective real
LOOK_S = 0.02  # between two looks at the ranks
NOTICE_S = 15.0  # for ranks to notice that another one has died; launch/train.py lets rank 0 speak first, for 5 s
GRACE_S = 35.0  # from SIGTERM to SIGKILL, to save or to finish an upload


def supervise(recipe: str, overrides: list[str], ranks: int | None = None) -> int:
    """Run every phase that is left; returns the exit code (errors.py).

    Errors: UserError before any process starts, for whatever can be known by then.
    """
    signals = Signals()
    try:
        return _run(recipe, overrides, ranks, signals)
    except Asked:
        print("stopped before the first step; nothing was lost")
        return STOPPED
    finally:
        signals.close()


def _run(recipe: str, overrides: list[str], ranks: int | None, signals: "Signals") -> int:
    settings = config.load(recipe, overrides)
    device = dist.choose_device(settings.engine.device).type
    ranks = num_ranks(ranks, device)
    plan = Plan(settings.phases)
    begin = origin.find(settings, lambda text: print(text, flush=True))
    done = begin.step
    last = plan.named(settings.run.stop_after).last if settings.run.stop_after else plan.last_step
    rows_per_step = runfolder.check(settings, ranks, done, begin.ancestor, begin.manifest)["rows_per_step"]
    _check_engine(settings, ranks, rows_per_step)
    origin.inherit_data(settings, begin)
    data.prepare(settings, rows_per_step, ranks)
    if done >= last:
        print(f"{settings.run.name}: the plan is complete at step {done}; nothing to do")
        return DONE
    for phase in plan.phases:
        if done < phase.last <= last:
            print(
                f"phase {phase.name}: steps {max(done + 1, phase.first)} to {phase.last}, {ranks} new processes",
                flush=True,
            )
            words = [recipe, *overrides, f"run.stop_after={phase.name}"]
            code = _launch(Ranks(words, ranks, device), signals)
            if code != DONE:
                return code
    print(_summary(settings, plan, last))
    return DONE


def _launch(ranks: "Ranks", signals: "Signals") -> int:
    """One set of ranks from start to end: their exit code, and a word to the user where they could not give one."""
    first = ranks.run(signals)
    if signals.interrupts > 1:
        print("left at once; the same command goes on from the last checkpoint")
        return INTERRUPTED
    if first is None:
        return DONE
    if first.verdict == STOPPED != first.code:
        print("stopped, and nothing was lost; the same command goes on from there")
    if first.verdict == FAULT:
        print(f"error: {first}; the same command goes on from the last checkpoint", file=sys.stderr)
    return first.verdict


def _check_engine(settings: Config, ranks: int, rows_per_step: int) -> None:
    """Errors: UserError for what the ranks would find wrong with model and engine, seconds later and all at once."""
    device = dist.choose_device(settings.engine.device)
    if isinstance(settings.model, TransformersSection):  # of our own decoder config.load knows all that can be wrong
        model.build(settings.model, device="meta", document_mask=settings.packing.document_mask)
    precision, _ = ds_config.choose_precision(settings.engine.precision, device)
    accumulation = runfolder.accumulation(settings, rows_per_step, ranks)
    ds_config.fill(settings, precision=precision, accumulation=accumulation, world_size=ranks)


def num_ranks(asked: int | None, device: str) -> int:
    """All GPUs, or two ranks on a CPU, or what was asked for. Errors: UserError for a count the machine lacks."""
    gpus = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, 0)
    if asked is None:
        return gpus or CPU_RANKS
    if asked < 1 or (gpus and asked > gpus):
        want = f"1 to {gpus}, one for each GPU" if gpus else "1 or more"
        raise UserError(Problem("this machine cannot run so many ranks", str(asked), want, "--ranks"))
    return asked


class Asked(BaseException):
    """A signal came while there were no ranks to pass it on to."""


class Signals:
    """The signals that ask this command to stop: the ranks get them, who save; without ranks the command just ends."""

    def __init__(self) -> None:
        self.kept: list[int] | None = None  # for the ranks, while there are any
        self.interrupts = 0
        self._before = {number: signal.signal(number, self._on_signal) for number in dist.STOP_SIGNALS}

    def close(self) -> None:
        """Listen no longer."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.kept is None:
            raise Asked
        self.kept.append(signal.SIGKILL if self.interrupts > 1 else number)  # the second Ctrl-C: leave at once


@dataclass(frozen=True)
class End:
    """How a rank ended: `code` is its exit code, or -N if signal N ended it."""

    rank: int
    code: int

    @property
    def verdict(self) -> int:
        """The exit code (errors.py) of a launch in which this was the first end of a rank that was not done."""
        if -self.code in dist.STOP_SIGNALS:  # dist.StopFlag: only before the first step, when there is nothing to lose
            return STOPPED
        return self.code if self.code in (BAD_INPUT, STOPPED, INTERRUPTED) else FAULT

    def __str__(self) -> str:
        if self.code >= 0:
            return f"rank {self.rank} ended with code {self.code}"
        name = next((known.name for known in signal.Signals if known == -self.code), f"signal {-self.code}")
        return f"rank {self.rank} was ended by {name}"


class Ranks:
    """One launch of the ranks: start, pass signals on, wait, leave nothing behind."""

    def __init__(self, words: list[str], count: int, device: str) -> None:
        self._command = [sys.executable, "-u", str(SCRIPT), *words]
        self._env = os.environ | {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(dist.free_port()),
            "SMOLTRAIN_SUPERVISOR": str(os.getpid()),
        }
        if device != "cuda":
            self._env["DS_ACCELERATOR"] = device
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, signals: Signals) -> End | None:
        """The first rank that ended without being done, None if all were done. Nothing of them is alive afterwards."""
        signals.kept = []
        try:
            self._start()
            return self._wait(signals.kept)
        finally:
            self._sweep()
            signals.kept = None

    def _start(self) -> None:
        """A Ctrl-C is held back until all are there; each lets it in when Python could not answer with a traceback."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which children inherit
        try:
            for rank in map(str, range(self._count)):
                env = self._env | {"RANK": rank, "LOCAL_RANK": rank}
                process = subprocess.Popen(self._command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _wait(self, asked: list[int]) -> End | None:
        """Until all have ended; after the first that died the others are asked, and at last made, to end too."""
        running, first = dict(enumerate(self._processes)), None
        due: list[tuple[float, int]] = []  # when to send which signal
        while running:
            time.sleep(LOOK_S)
            while asked:
                self._tell(asked.pop(0))
            ends = [End(rank, code) for rank, process in running.items() if (code := process.poll()) is not None]
            for end in ends:
                del running[end.rank]
            early = [end for end in ends if end.code != DONE]
            if first is None and early:
                first = min(early, key=lambda end: (end.code == FAULT, end.code))  # who lost a dead one says FAULT
                due = _due(first, time.monotonic())
            while due and time.monotonic() >= due[0][0]:
                self._tell(due.pop(0)[1])
        return first

    def _tell(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)

    def _sweep(self) -> None:
        """Nothing outlives the launch: what is left in the sessions of the ranks is asked, then made, to end."""
        deadline = time.monotonic() + GRACE_S
        sessions = {process.pid for process in self._processes}
        left, told = _members(sessions), set[int]()
        while left:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    if time.monotonic() > deadline:
                        process.kill()
                    elif process.pid not in told:
                        told.add(process.pid)
                        process.terminate()
            time.sleep(LOOK_S)
            left = _members(sessions)


def _due(first: End, now: float) -> list[tuple[float, int]]:
    """When to send which signal to the others, who may wait for the one that ended for ever."""
    if first.verdict == STOPPED:
        if first.code == STOPPED:  # by agreement of all
            return []
        return [(now, signal.SIGTERM), (now + GRACE_S, signal.SIGKILL)]
    return [(now + NOTICE_S, signal.SIGTERM), (now + NOTICE_S + GRACE_S, signal.SIGKILL)]


def _members(sessions: set[int]) -> list[psutil.Process]:
    """The living processes of these sessions."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _summary(settings: Config, plan: Plan, done: int) -> str:
    """What was reached and what to do with it."""
    run, command = settings.run_folder, os.path.relpath(Path(sys.executable).with_name("smoltrain"))
    name = "validation/loss_nats_per_token"
    losses = [line[name] for line in files.json_lines(run / "metrics.jsonl") if name in line]
    reached = f", validation loss {losses[-1]:.4f} nats per token" if losses else ""
    lines = [f"done: {done} of {plan.last_step} steps{reached}; weights, curves and metrics are in {run}", "next:"]
    lines.append(f"  {command} generate {run} --prompt 'To be'")
    if list(run.glob("wandb/offline-run-*")):
        lines.append(f"  {Path(command).with_name('wandb')} sync {run}/wandb/offline-run-*")
    lines.append(f"  {command} show {run}/config.yaml --plan")
    return "\n".join(lines)
