"""The training loop: one step after the other, and what is due after each."""

import functools
import time

from smoltrain.distributed.stop import StopFlag
from smoltrain.distributed.world import World
from smoltrain.errors import DONE, STOPPED, UserError
from smoltrain.run.plots import draw_run
from smoltrain.schedule import describe_completion
from smoltrain.training import after_step
from smoltrain.training.garbage import collect_between_steps
from smoltrain.training.session import Session
from smoltrain.training.step import train_steps


def run_loop(session: Session) -> int:
    """Train until the start's last step, or until a rank is to stop; returns the exit code. Collective.

    A stop is met at the beginning of the next step, before its rows are waited for, in the numbers that the ranks
    exchange anyway. Errors: those of `train_steps`, and of saving.
    """
    start = session.start
    plan = session.plan
    config = session.config
    show_activity = session.tracker.show_activity
    session.stop.listen()
    if start.validation_missing:
        with show_activity("evaluating"):
            is_whole = after_step.validate(session, start.point.step)
        if not is_whole:
            return _leave(session, start.point.step)
    with collect_between_steps() as collect:
        steps = range(start.point.step + 1, start.last_step + 1)
        for step, result in train_steps(steps, session, functools.partial(after_step.is_anything_due, session)):
            after_step.record_rows(session, result)
            if result.stopped:
                after_step.save(session, step - 1)
                return _leave(session, step - 1, waited_for_data=result.waited_for_data)
            session.saver.poll()
            after_step.record(session, step, result)
            after_step.call_callbacks(session, step, result)
            if plan.is_due(step, config.evaluate.every):
                with show_activity("evaluating"):
                    after_step.validate(session, step)
            if plan.is_due(step, config.evaluate.tasks_every):
                with show_activity("evaluating"):
                    after_step.evaluate_tasks(session, step)
            if plan.is_due(step, config.evaluate.memorisation_every):
                with show_activity("measuring memorisation"):
                    after_step.gauge_memorisation(session, step)
            if plan.is_due(step, config.sample.every):
                with show_activity("sampling"):
                    after_step.sample(session, step)
            collect(step)
            if plan.is_due(step, config.checkpoint.every) or plan.ends_phase(step):
                with show_activity("saving"):
                    after_step.save(session, step)
    return _leave(session, start.last_step)


def _leave(session: Session, step: int, *, waited_for_data: bool = False) -> int:
    """Publish what is being written and say how it ended: all that was asked for, or a stop after `step`."""
    began_s = time.perf_counter()
    session.watchdog.mark("save")
    with session.tracker.show_activity("saving"):
        session.saver.finish()
    is_last = step == session.start.last_step
    curves = _draw_curves(session) if is_last and session.world.is_first else ""
    after_step.record_closing(session, step, time.perf_counter() - began_s)
    reason = gather_stop_reason(session.world, session.stop)
    if reason:
        reached = f"after step {step}" if step else "before the first step"
        while_waiting = ", waiting for data" if waited_for_data else ""
        session.tracker.record_ending("stopped", f"{reached} ({reason}){while_waiting}")
        session.tracker.say(f"stopped {reached} ({reason}){while_waiting}; the same command goes on from there")
        return STOPPED
    completion = describe_completion(session.plan, step)
    session.tracker.record_ending("done", completion)
    session.tracker.say(f"{session.config.run.name}: {completion}{curves}")
    return DONE


def _draw_curves(session: Session) -> str:
    """Draw the run, which is saved by now; where, for its last line. What cannot be written is warned of."""
    try:
        draw_run(session.plan, session.folder.path)
    except UserError as error:
        session.tracker.say(f"WARNING: {error}; `smoltrain plot` draws them at any time")
        return ""
    return f"; the curves are in {session.folder.path / 'plots'}"


def gather_stop_reason(world: World, stop: StopFlag) -> str | None:
    """Why the lowest of the ranks that are to stop is; None if none is. Collective."""
    stop.is_raised()  # which looks at its launchers
    for reason in world.gather(stop.reason):
        if reason:
            return reason
    return None
