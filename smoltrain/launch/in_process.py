"""A run inside somebody's program, a notebook or a script: one rank, in this process, which goes on afterwards.

The training is that of every rank (training/run.py), and so are the bits. What is different is all around it: mistakes
and faults are exceptions, an interrupt comes back as the reason of a stop, and the process is given back as it was.
"""

import gc
import os
from collections.abc import Sequence

from smoltrain.config.schema import Config
from smoltrain.distributed.stop import StopFlag
from smoltrain.distributed.world import choose_device, close_world, is_world_open
from smoltrain.engine.deepspeed_private import choose_accelerator, close_deepspeed
from smoltrain.errors import STOPPED, Problem, UserError
from smoltrain.launch.notebook_bar import NotebookBar, is_notebook
from smoltrain.launch.process_state import keep_process_state
from smoltrain.run.run_lock import hold_run_lock
from smoltrain.training.callbacks import CallbackFailed, StepCallback
from smoltrain.training.run import run_training
from smoltrain.training.start import begin_run


def train_in_process(config: Config, callbacks: Sequence[StepCallback] = ()) -> str | None:
    """Train every phase that is left; the name of the signal that stopped the run, or None if it is done.

    Errors: UserError, TrainingStopped; whatever a callback raises, after a checkpoint; KeyboardInterrupt before the
    first step and at the second interrupt.
    """
    _check_process_is_free()
    config = _without_watchdog(config)
    stop = StopFlag(owns_process=False)
    try:
        device = choose_device(config.engine.device)
        with keep_process_state(device), hold_run_lock(config):
            try:
                choose_accelerator(device.type)
                start = begin_run(config, 1, device)
                if is_notebook() and start.has_work:
                    callbacks = [NotebookBar(start.point.step, start.last_step), *callbacks]
                code = run_training(config, start, stop=stop, callbacks=callbacks)
            except CallbackFailed as failure:
                raise (failure.__cause__ or failure) from None
            finally:
                gc.collect()  # the engine, whose parts hold each other
                close_deepspeed()
                close_world()
    finally:
        stop.close()
    return stop.reason if code == STOPPED else None


def _check_process_is_free() -> None:
    """Errors: UserError where this process is a rank of something else already."""
    if is_world_open():
        saw = "torch.distributed has a process group"
        want = "none, or ranks=1, which trains in a process of its own"
        raise UserError(Problem("this process is a rank already", saw, want, "the program that calls train"))
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        want = "a plain `python`; ranks=N starts N processes, and launchers start launch/train.py"
        raise UserError(Problem("a launcher started this program", f"WORLD_SIZE={size}", want, "how it is started"))


def _without_watchdog(config: Config) -> Config:
    """The watchdog ends a process that hangs, for the sake of other ranks; here there are none, and it is not ours."""
    return config.model_copy(update={"engine": config.engine.model_copy(update={"hang_s": 0})})
