"""run_training(config): the whole of training on one rank. The table of contents of the project.

config -> world -> start (where to begin, the run's identity, data) -> session (rows, model, engine, what was saved,
records) -> loop (a step, and what is due after it) -> done
"""

import functools
import gc
from collections.abc import Sequence

import torch

from smoltrain.checkpoint.manifest import describe_last_checkpoint
from smoltrain.config.schema import Config
from smoltrain.distributed.idle_ranks import await_training, end_idle_ranks
from smoltrain.distributed.stop import StopFlag
from smoltrain.distributed.world import World, keep_first_ranks, open_world
from smoltrain.engine.deepspeed_json import read_deepspeed_text, remember_deepspeed_text
from smoltrain.errors import DONE, STOPPED, RankTrainingStopped
from smoltrain.run.private_folders import spread_run_files
from smoltrain.run.run_lock import lock_run_folder
from smoltrain.run.shared_folder import check_shared_folder
from smoltrain.run.summary import describe_run
from smoltrain.schedule import describe_completion
from smoltrain.training.callbacks import StepCallback
from smoltrain.training.loop import gather_stop_reason, run_loop
from smoltrain.training.open_session import open_session
from smoltrain.training.out_of_memory import explain_out_of_memory, is_out_of_memory
from smoltrain.training.session import Session
from smoltrain.training.spikes import Rewind
from smoltrain.training.start import Start, begin_run


def run_training(
    config: Config, start: Start | None = None, *, began_at: float | None = None, stop: StopFlag | None = None,
    callbacks: Sequence[StepCallback] = (),
) -> int:  # fmt: skip
    """Train until the plan, run.stop_after or a signal ends it; returns the exit code (errors.py). Collective.

    `start` is what a supervisor has worked out, which holds the lock of the run; without one rank 0 does both, for a
    command that began at `began_at` (seconds since 1970). `stop` and `callbacks` are those of a program that this run
    trains inside.
    Errors: UserError and TrainingStopped, on every rank alike; RankTrainingStopped where one rank cannot write its own
    files; CallbackFailed, when what was trained is saved.
    """
    stop = stop or StopFlag()
    requested = config if start is None else start.requested
    remember_deepspeed_text(config.engine.ds_config, read_deepspeed_text(config.engine.ds_config))  # for rewinds too
    world = open_world(config.engine.device, config.engine.lost_host_s)
    if start is not None:  # a supervisor has opened no more ranks than train
        return _train_to_the_end(requested, start, world, stop, callbacks, prints_summary=False)
    world.run_on_first_rank(lambda: lock_run_folder(config), patient=True)  # until this process ends
    check_shared_folder(config, world)
    begin = functools.partial(begin_run, requested, world.size, world.device, began_at=began_at)
    start = world.run_on_first_rank(begin, patient=True)
    num_idle = world.size - start.num_ranks
    if not num_idle:
        return _train_to_the_end(requested, start, world, stop, callbacks, prints_summary=True)
    training_world = keep_first_ranks(world, start.num_ranks)
    if training_world is None:
        stop.listen()
        return await_training(world.store, stop.is_raised)
    code = _train_to_the_end(requested, start, training_world, stop, callbacks, prints_summary=True)
    if world.is_first:
        end_idle_ranks(world.store, code, num_idle)
    return code


def _train_to_the_end(
    requested: Config, start: Start, world: World, stop: StopFlag, callbacks: Sequence[StepCallback], *,
    prints_summary: bool,
) -> int:  # fmt: skip
    """One session after the other, for a rewind ends one; the exit code. Errors: those of run_training."""
    while True:
        if not start.has_work:
            if world.is_first:
                complete = describe_completion(start.plan, start.point.step, start.last_step)
                print(f"{requested.run.name}: {complete}; nothing to do")
            return DONE
        spread_run_files(start.config, start.point.checkpoint, world)
        try:
            return _train_session(start, world, stop, callbacks, prints_summary=prints_summary)
        except OSError as error:  # of this rank's own files: metrics, samples, ledger, log
            last_checkpoint = describe_last_checkpoint(requested.run_folder / "checkpoints")
            raise RankTrainingStopped(f"rank {world.rank}: {error}; {last_checkpoint}") from None
        except Rewind as rewind:  # what a kill and the same command would do, without new processes
            if world.is_first:
                print(rewind, flush=True)
        gc.collect()  # the engine, whose parts hold each other
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        # Another checkpoint may be the newest now, and there are rows to pass over.
        begin = functools.partial(begin_run, requested, world.size, world.device, before=start)
        start = world.run_on_first_rank(begin, patient=True)


def _train_session(
    start: Start, world: World, stop: StopFlag, callbacks: Sequence[StepCallback], *, prints_summary: bool
) -> int:
    """From opening to closing everything; the exit code. A stop that came while W&B was uploading, say, counts too."""
    session: Session | None = None
    try:
        with open_session(start, world, stop, callbacks) as session:
            code = run_loop(session)
            if code == DONE and prints_summary and world.is_first:
                session.tracker.say_summary(describe_run(session.plan, session.folder.path))
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, start, world, session) from None
    if code != DONE:
        return code
    reason = gather_stop_reason(world, stop)
    if reason is None:
        return DONE
    if world.is_first:
        print(f"stopped at the end of the last step ({reason}); the same command goes on from there", flush=True)
    return STOPPED
