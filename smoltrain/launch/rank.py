"""One rank of a training run: under `smoltrain train`, `deepspeed launch/train.py RECIPE ...`, torchrun or python."""

import signal

if __name__ == "__main__":  # before the imports, in which Python's own answer to Ctrl-C would be a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the training loop listens, it just ends this rank
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # supervisor.py holds it back until here

import ctypes
import os
import re
import sys
import time
import traceback
import warnings
from typing import TYPE_CHECKING

from smoltrain.config.keys import read_key_options
from smoltrain.config.load import load_config, split_recipe_words
from smoltrain.config.schema import Config
from smoltrain.console import guard_console
from smoltrain.errors import (
    BAD_INPUT,
    FAULT,
    RankTrainingStopped,
    RankUserError,
    TrainingStopped,
    UserError,
    format_error,
)
from smoltrain.openmp import choose_waiting
from smoltrain.redact import redact_text

if TYPE_CHECKING:
    from smoltrain.train.start import Start

START_ON_STDIN = "--start-on-stdin"  # the first word of a supervisor's rank; the others only say in `ps` what runs
LOCAL_RANK_OPTIONS = ("--local_rank=", "--local-rank=")  # DeepSpeed's launcher and torch.distributed.launch add them
LAST_WORD_S = 5.0
CONNECTION_LOST = re.compile("Connection (closed|reset) by peer|Broken pipe")  # gloo's words
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def run_rank(words: list[str]) -> int:
    """Train what the command line says; returns the exit code."""
    began_at = time.time()
    os.environ.update(choose_waiting())  # read when torch is imported
    words = [word for word in words if not word.startswith(LOCAL_RANK_OPTIONS)]
    try:
        config, start = read_words(words)
        sys.argv[1:] = map(redact_text, sys.argv[1:])  # which W&B writes down
        if config.engine.device != "auto":
            os.environ["DS_ACCELERATOR"] = config.engine.device  # which DeepSpeed reads when it is imported
        keep_freed_memory()
        from smoltrain.train.run import run_training  # seconds of imports, which a mistake in the words does not cost

        return run_training(config, start, began_at=began_at)
    except (UserError, TrainingStopped) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankTrainingStopped | RankUserError):
            print(format_error(error), file=sys.stderr, flush=True)
        else:
            time.sleep(LAST_WORD_S)  # launchers kill all ranks when one has left: let rank 0 say why
        return BAD_INPUT if isinstance(error, UserError) else FAULT
    except RuntimeError as error:
        if not CONNECTION_LOST.search(str(error)):
            traceback.print_exc()
        else:
            print(
                "error: the connection to another rank is lost: it has left, or was killed", file=sys.stderr, flush=True
            )
        return FAULT
    except BaseException:
        traceback.print_exc()
        return FAULT


def read_words(words: list[str]) -> "tuple[Config, Start | None]":
    """The config that the words describe; or that of the start which the supervisor hands over. Errors: UserError."""
    if words[:1] == [START_ON_STDIN]:
        from smoltrain.launch.config_pipe import unpack_start  # and torch with it

        start = unpack_start(sys.stdin.buffer)
        return start.config, start
    return load_config(*split_recipe_words(read_key_options(words))), None


def keep_freed_memory() -> None:
    """Let malloc keep what is freed instead of giving it back to the kernel (man 3 mallopt), where libc is glibc.

    AdamW's temporaries on a CPU are as large as the model; each was a new mapping, whose pages the kernel zeroed again.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


if __name__ == "__main__":
    guard_console()
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, at DeepSpeed, on every rank
    code = run_rank(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the threads of DeepSpeed's CPU ranks abort now and then in a normal exit, with a false exit code
