"""What a run changes of the process that it trains in, and gives back when it trains inside somebody's program."""

import contextlib
import faulthandler
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch

LOGGERS = ("smoltrain", "DeepSpeed")  # that run/track.py leads into the run's own log


@contextlib.contextmanager
def keep_process_state(device: torch.device) -> Iterator[None]:
    """Whatever happens inside, afterwards these are as they were: environment, random states, threads, loggers, ...

    `device` is the run's: where that is a CPU no GPU is asked for its state, which would take memory of it.
    Signal handlers are StopFlag's, the process group is close_world's, CPU binding and garbage collection are given
    back where they are changed. What smoltrain's ranks do at their very start is not done to somebody's program at all:
    malloc keeps its settings, OpenMP its waiting, the standard streams stay unguarded.
    """
    with contextlib.ExitStack() as restoring:
        restoring.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, at DeepSpeed
        restoring.enter_context(_keep_environment())
        restoring.enter_context(_keep_random_states(device))
        restoring.enter_context(_keep_loggers())
        restoring.callback(setattr, sys, "excepthook", sys.excepthook)  # torch puts "[rank0]: " before tracebacks
        restoring.callback(torch.set_num_threads, torch.get_num_threads())
        if not faulthandler.is_enabled():
            restoring.callback(faulthandler.disable)
        yield


@contextlib.contextmanager
def _keep_environment() -> Iterator[None]:
    """Variables by which ranks are told who they are, and those that libraries set."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _keep_random_states(device: torch.device) -> Iterator[None]:
    """Of torch on every device in use, of numpy and of Python."""
    uses_cuda = device.type == "cuda" or torch.cuda.is_initialized()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count() if uses_cuda else 0)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _keep_loggers() -> Iterator[None]:
    """The handlers that a run adds are closed, those that it takes away come back."""
    raises = logging.raiseExceptions
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        logging.raiseExceptions = raises
        for logger, handlers, level, propagate in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
