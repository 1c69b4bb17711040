"""A fresh set of processes for each phase, under the real `deepspeed` launcher: what `./train.sh` does after set-up.

Each phase restores from disk on every rank, so a checkpoint that could not be restored would be found at once.
This process owns the launcher's process group: it passes signals to the ranks themselves and leaves nothing behind.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from smoltrain import config, data, dist, ds_config, model, origin, runfolder
from smoltrain.errors import BAD_INPUT, DONE, FAULT, STOPPED, Problem, UserError
from smoltrain.plan import Plan
from smoltrain.schema import Config

SCRIPT = Path(__file__).parent.parent / "launch" / "train.py"
CPU_RANKS = 2  # on a machine without a GPU: enough to make every collective real
ENDED_BY_SIGNAL = (
    {-n for n in (2, 15)} | {128 + n for n in (2, 15)} | {256 - n for n in (2, 15)}
)  # as each launcher says it
GRACE_S = 40.0  # for ranks to save and leave after a signal


def supervise(recipe: str, overrides: list[str], ranks: int | None = None) -> int:
    """Run every phase that is left; returns the exit code (errors.py).

    Errors: UserError before any process starts, for whatever can be known by then.
    """
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
            code = Ranks([recipe, *overrides, f"run.stop_after={phase.name}"], ranks, device).wait()
            if code != DONE:
                return code
    print(_summary(settings, plan, last))
    return DONE


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


class Ranks:
    """One launch of the ranks: start, pass signals on, wait, sweep."""

    def __init__(self, words: list[str], ranks: int, device: str) -> None:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        launcher = [str(deepspeed), "--num_accelerators", str(ranks), "--master_port", str(dist.free_port())]
        launcher += ["--log_level", "critical"]  # it calls every exit code but 0 an error, 75 too
        env = os.environ | {"SMOLTRAIN_SUPERVISOR": str(os.getpid())}
        if device != "cuda":
            env["DS_ACCELERATOR"] = device
        self._interrupts = 0
        self._signalled = False
        self._process = subprocess.Popen(
            [*launcher, str(SCRIPT), *words], env=env, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def wait(self) -> int:
        """The true exit code of the ranks: 0, 2, 75, or 1 for any other."""
        before = {
            number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            code = self._process.wait()
        finally:
            self._sweep()
            for number, handler in before.items():
                signal.signal(number, handler)
        if code in (DONE, BAD_INPUT, STOPPED):
            return code
        if self._signalled and code in ENDED_BY_SIGNAL:
            print("stopped before the first step; nothing was lost")
            return STOPPED
        words = f"error: a rank died (exit code {code}); the same command goes on from the last checkpoint"
        print(words, file=sys.stderr)
        return FAULT

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """To the ranks alone: the launcher would kill them one by one and hide their exit code."""
        self._signalled = True
        self._interrupts += number == signal.SIGINT
        ranks = self._ranks()
        if self._interrupts > 1 or not ranks:  # the second Ctrl-C, or nothing has started that could be lost
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL if ranks else signal.SIGTERM)
        for process in ranks:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _ranks(self) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if str(SCRIPT) in process.cmdline()[:3]:  # python -u launch/train.py ...
                        found.append(process)
        return found

    def _sweep(self) -> None:
        """Nothing of the launcher's session outlives it."""
        deadline = time.monotonic() + GRACE_S
        number = signal.SIGTERM
        while True:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return
            number = 0 if time.monotonic() < deadline else signal.SIGKILL
            time.sleep(0.1)


def _summary(settings: Config, plan: Plan, done: int) -> str:
    """What was reached and what to do with it."""
    run, command = settings.run_folder, os.path.relpath(Path(sys.executable).with_name("smoltrain"))
    losses = [v for line in _metrics(run) if (v := line.get("validation/loss_nats_per_token")) is not None]
    reached = f", validation loss {losses[-1]:.4f} nats per token" if losses else ""
    lines = [f"done: {done} of {plan.last_step} steps{reached}; weights, curves and metrics are in {run}", "next:"]
    lines.append(f"  {command} generate {run} --prompt 'To be'")
    if list(run.glob("wandb/offline-run-*")):
        lines.append(f"  {Path(command).with_name('wandb')} sync {run}/wandb/offline-run-*")
    lines.append(f"  {command} show {run}/config.yaml --plan")
    return "\n".join(lines)


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
