"""A fresh set of rank processes for each phase, started and watched here: what `./train.sh` does after set-up.

Where to begin, whether the run may go on and its data are looked at here, once (training/start.py), and handed to the
ranks. Each phase restores from disk on every rank, so a checkpoint that could not be restored would be found at once.
"""

import contextlib
import sys
from collections.abc import Callable

import torch
from rich.console import Console

from smoltrain.config.load import stop_after_phase
from smoltrain.config.load_to_train import load_config_to_train
from smoltrain.config.schema import Config, PhaseSection
from smoltrain.distributed.world import choose_device
from smoltrain.engine.deepspeed_json import read_deepspeed_text, remember_deepspeed_text
from smoltrain.errors import DONE, FAULT, INTERRUPTED, STOPPED, Problem, UserError
from smoltrain.launch.rank_processes import RankProcesses
from smoltrain.launch.signal_forwarder import SignalForwarder, StopRequested
from smoltrain.run.run_lock import hold_run_lock
from smoltrain.run.screen import Screen
from smoltrain.run.summary import describe_run
from smoltrain.schedule import Phase, Plan, describe_completion
from smoltrain.terminal import show_activity
from smoltrain.training.start import Start, begin_run

CPU_RANKS = 2  # on a machine without a GPU: enough to make every collective real


def supervise_run(recipe: str, overrides: list[str], ranks: int | None = None, began_at: float | None = None) -> int:
    """Run every phase that is left; returns the exit code (errors.py).

    The command began at `began_at` (seconds since 1970), now by default.
    Errors: UserError before any process starts, for whatever can be known by then.
    """
    return supervise_config(lambda: load_config_to_train(recipe, overrides), [recipe, *overrides], ranks, began_at)


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
    config: Config, words: list[str], num_ranks: int | None, signals: SignalForwarder, screen: Screen,
    held: contextlib.ExitStack, began_at: float | None,
) -> int:  # fmt: skip
    remember_deepspeed_text(config.engine.ds_config, read_deepspeed_text(config.engine.ds_config))  # for all phases
    device = choose_device(config.engine.device)
    num_ranks = choose_num_ranks(num_ranks, device.type)
    lock = held.enter_context(hold_run_lock(config))  # until this command and the last rank have ended
    with show_activity("looking at checkpoints and data"):
        start = begin_run(config, num_ranks, device, say=screen.say, one_phase=True, began_at=began_at)
    plan = start.plan  # in steps, which the recipe may not be: only begin_run resolves it
    last_step = plan.last_step_until(config.run.stop_after)
    if not start.has_work:
        complete = describe_completion(plan, start.point.step, last_step)
        screen.say(f"{config.run.name}: {complete}; nothing to do")
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
    continues = phase.spec.schedule == "continue"
    changes: list[str] = []
    for name in ("schedule", "lr", "weight_decay", "mix"):
        if name == "lr" and continues:  # which has no rate of its own
            changes.append(f"lr {plan.lr(phase.first):g} to its end")
        elif getattr(before, name) != getattr(phase.spec, name):
            changes.append(f"{name} {_format_setting(before, name)} -> {_format_setting(phase.spec, name)}")
    if phase.spec.optimizer_state == "reset":
        changes.append("the optimizer's state begins at zero")
    return ", ".join(changes)


def _format_setting(spec: PhaseSection, name: str) -> str:
    value = getattr(spec, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _launch_ranks(ranks: RankProcesses, signals: SignalForwarder) -> int:
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
