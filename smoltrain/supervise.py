"""A fresh set of processes for each phase, under the real `deepspeed` launcher: what `./train.sh` does after set-up.

Each phase restores from disk on every rank, so a checkpoint that could not be restored would be found at once.
This process owns the launcher's process group: it passes signals to the ranks themselves and leaves nothing behind.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import psutil
import torch

from smoltrain import checkpoint, config, data, dist, ds_config, files, model, origin, runfolder
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED, Problem, UserError
from smoltrain.plan import Plan
from smoltrain.schema import Config

SCRIPT = Path(__file__).parent.parent / "launch" / "train.py"
CPU_RANKS = 2  # on a machine without a GPU: enough to make every collective real
# As each launcher says that a rank, or it itself, was ended by one of them.
ENDED_BY_SIGNAL = {code for number in dist.STOP_SIGNALS for code in (-number, 128 + number, 256 - number)}
GRACE_S = 35.0  # for ranks whose launcher is gone, to save and leave


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
    rows_per_step = runfolder.check(settings, ranks, done, begin.ancestor)["rows_per_step"]
    origin.inherit_data(settings, begin)
    data.prepare(settings, rows_per_step, ranks)
    if done >= last:
        print(f"{settings.run.name}: the plan is complete at step {done}; nothing to do")
        return DONE
    _check_engine(settings, ranks, rows_per_step)
    for phase in plan.phases:
        if done < phase.last <= last:
            print(
                f"phase {phase.name}: steps {max(done + 1, phase.first)} to {phase.last}, {ranks} new processes",
                flush=True,
            )
            words = [recipe, *overrides, f"run.stop_after={phase.name}"]
            code = _launch(Ranks(words, ranks, device), settings.run_folder, phase.last, signals)
            if code != DONE:
                return code
    print(_summary(settings, plan, last))
    return DONE


def _launch(ranks: "Ranks", run: Path, last: int, signals: "Signals") -> int:
    """One launch, until step `last`: its true exit code, and a word to the user where the ranks could not give one."""
    since = time.time()
    said = ranks.run(signals)
    if signals.interrupts > 1:
        print("left at once; the same command goes on from the last checkpoint")
        return INTERRUPTED
    code = _verdict(said, _saved(run) >= last, signals.asked or ranks.were_asked, _has_lost(run, since))
    if code == STOPPED != said:
        print("stopped, and nothing was lost; the same command goes on from there")
    if code == FAULT:
        died = f"a rank, or what started it, died (exit code {said})"
        print(f"error: {died}; the same command goes on from the last checkpoint", file=sys.stderr)
    return code


def _check_engine(settings: Config, ranks: int, rows_per_step: int) -> None:
    """Errors: UserError for what the ranks would find wrong with model and engine, seconds later and all at once."""
    device = dist.choose_device(settings.engine.device)
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
        self.ranks: Ranks | None = None
        self.asked = False
        self.interrupts = 0
        self._before = {number: signal.signal(number, self._on_signal) for number in dist.STOP_SIGNALS}

    def close(self) -> None:
        """Listen no longer."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self.interrupts += number == signal.SIGINT
        if self.ranks is None:
            raise Asked
        self.ranks.tell(signal.SIGKILL if self.interrupts > 1 else number)  # the second Ctrl-C: leave at once


class Ranks:
    """One launch of the ranks: start, pass signals on, wait, leave nothing behind."""

    def __init__(self, words: list[str], ranks: int, device: str) -> None:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        self._command = [str(deepspeed), "--num_accelerators", str(ranks), "--master_port", str(dist.free_port())]
        self._command += ["--log_level", "critical"]  # it calls every exit code but 0 an error, 75 too
        self._command += [str(SCRIPT), *words]
        self._env = {} if device == "cuda" else {"DS_ACCELERATOR": device}
        self._launcher = 0  # its process id, and that of the session that it leads
        self.were_asked = False

    def run(self, signals: Signals) -> int:
        """The launcher's exit code, when nothing of the launch is alive any more."""
        signals.ranks = self
        with tempfile.TemporaryDirectory() as folder:
            asked = Path(folder, "asked")
            told = {"SMOLTRAIN_SUPERVISOR": str(os.getpid()), "SMOLTRAIN_ASKED": str(asked)}
            launcher = subprocess.Popen(
                self._command, env=os.environ | self._env | told, stdin=subprocess.DEVNULL, start_new_session=True
            )
            self._launcher = launcher.pid
            try:
                if signals.asked:  # in the meantime
                    self.tell(signal.SIGTERM)
                return launcher.wait()
            finally:
                self._sweep()
                self.were_asked = asked.exists()
                signals.ranks = None

    def tell(self, number: int) -> None:
        """Signal the ranks alone, as the launcher would kill them one by one; before there are any, end the launch."""
        if not self._launcher:
            return
        members = _members(self._launcher)
        ranks = [process for process in members if str(SCRIPT) in _words(process)[:3]]  # python -u launch/train.py ...
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL or not ranks:
                os.killpg(self._launcher, signal.SIGKILL if number == signal.SIGKILL else signal.SIGTERM)
                return
        for process in ranks:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _sweep(self) -> None:
        """Nothing of the launch outlives it; where its launcher was killed, the ranks may still save."""
        deadline = time.monotonic() + GRACE_S
        if _members(self._launcher):
            self.tell(signal.SIGTERM)
        while _members(self._launcher):
            if time.monotonic() > deadline:
                self.tell(signal.SIGKILL)
            time.sleep(0.1)


def _members(session: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _verdict(code: int, done: bool, asked: bool, lost: bool) -> int:
    """The exit code that is true of one launch (errors.py), whatever its launcher said.

    A runner whose launcher was killed says 0; a launcher that was signalled says 1, even if all ranks saved and left.
    """
    if code in (BAD_INPUT, STOPPED) or (code == DONE and done):
        return code
    stopped = code == DONE or code in ENDED_BY_SIGNAL or (asked and code == FAULT)
    return STOPPED if stopped and not lost else FAULT


def _has_lost(run: Path, since: float) -> bool:
    """Whether steps were computed since then (seconds of time.time) that no checkpoint holds."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists() or metrics.stat().st_mtime < since:
        return False
    return max((line["step"] for line in files.json_lines(metrics)), default=0) > _saved(run)


def _saved(run: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max(checkpoint.steps(run / "checkpoints"), default=0)


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
