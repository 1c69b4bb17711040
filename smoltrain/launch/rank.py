"""One rank of a training run: under `smoltrain train`, `deepspeed launch/train.py ...`, torchrun, srun or none."""

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
from collections.abc import Mapping
from typing import TYPE_CHECKING

from smoltrain.config.keys import read_key_options
from smoltrain.config.load import split_recipe_words
from smoltrain.config.load_to_train import load_config_to_train
from smoltrain.config.schema import Config
from smoltrain.console import guard_console
from smoltrain.distributed.peers import find_peer_watch, leave_peers
from smoltrain.distributed.srun import adopt_srun_variables
from smoltrain.errors import (
    BAD_INPUT,
    FAULT,
    RankTrainingStopped,
    RankUserError,
    TrainingStopped,
    UserError,
    exception_message,
    find_origin_of_all,
    find_refusal,
    format_error,
)
from smoltrain.openmp import choose_waiting
from smoltrain.redact import redact_text

if TYPE_CHECKING:
    from smoltrain.training.start import Start

START_ON_STDIN = "--start-on-stdin"  # the first word of a supervisor's rank; the others only say in `ps` what runs
LOCAL_RANK_OPTIONS = ("--local_rank=", "--local-rank=")  # DeepSpeed's launcher and torch.distributed.launch add them
LAST_WORD_S = 5.0
VERDICT_S = 2.0  # for rank 0 to say who is gone, after a connection was lost
CONNECTION_LOST = re.compile("Connection (closed|reset) by peer|Broken pipe")  # gloo's words
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def run_rank(words: list[str]) -> int:
    """Train what the command line says; returns the exit code."""
    began_at = time.time()
    adopt_srun_variables()
    os.environ.update(choose_waiting())  # read when torch is imported
    words = [word for word in words if not word.startswith(LOCAL_RANK_OPTIONS)]
    try:
        config, start = read_words(words)
        sys.argv[1:] = map(redact_text, sys.argv[1:])  # which W&B writes down
        if config.engine.device != "auto":
            os.environ["DS_ACCELERATOR"] = config.engine.device  # which DeepSpeed reads when it is imported
        keep_freed_memory()
        from smoltrain.training.run import (
            run_training,  # seconds of imports, which a mistake in the words does not cost
        )

        code = run_training(config, start, began_at=began_at)
        leave_peers(code)
        return code
    except (UserError, TrainingStopped) as error:
        return say_error(error)
    except BaseException as error:
        refusal = find_refusal(error)
        if refusal is not None:
            return say_error(RankUserError(refusal))
        if isinstance(error, RuntimeError):
            return say_lost_connection(error)
        traceback.print_exc()
        leave_peers(FAULT, f"{type(error).__name__}: {exception_message(error)}")
        return FAULT


def say_error(error: UserError | TrainingStopped) -> int:
    """Print a mistake or fault on one rank of each machine that it concerns; returns the exit code.

    Launchers kill all ranks when one has left: whoever is silent gives the one that speaks the time to do so.
    """
    code = BAD_INPUT if isinstance(error, UserError) else FAULT
    rank = int(os.environ.get("RANK", "0"))
    watch = find_peer_watch()
    origin = find_origin_of_all(error)
    text = format_error(error)
    if isinstance(error, RankTrainingStopped | RankUserError) or (watch is None and is_other_node(os.environ)):
        print(text, file=sys.stderr, flush=True)
        leave_peers(code, str(error))
        return code
    if rank == 0:
        if watch is None or not watch.has_said(str(error)):
            where = f" ({watch.name_rank(origin)})" if watch and origin else ""
            print(text + where, file=sys.stderr, flush=True)
        leave_peers(code, str(error))
        return code
    leave_peers(code, "" if origin is not None else str(error))
    if watch is None:
        time.sleep(LAST_WORD_S)
        return code
    verdict = watch.explain(LAST_WORD_S)
    if verdict is None or (rank in verdict.gone and watch.is_alone_on_machine()):
        print(f"{text} ({watch.name_rank(rank)})", file=sys.stderr, flush=True)
    return code


def say_lost_connection(error: RuntimeError) -> int:
    """Who is gone, if a collective has failed for that; else the traceback. Returns the exit code."""
    watch = find_peer_watch()
    is_connection = CONNECTION_LOST.search(str(error)) or type(error).__name__.startswith("Dist")
    verdict = watch.explain(VERDICT_S if is_connection else 0.0) if watch else None
    if verdict:
        return verdict.code
    if is_connection:
        said = "error: the connection to another rank is lost: it has left, or was killed"
        print(said, file=sys.stderr, flush=True)
        leave_peers(FAULT)
    else:
        traceback.print_exc()
        leave_peers(FAULT, f"{type(error).__name__}: {exception_message(error)}")
    return FAULT


def is_other_node(environment: Mapping[str, str]) -> bool:
    """Whether this is the first rank of a machine other than rank 0's, by the words of its launcher."""
    local_size = environment.get("LOCAL_WORLD_SIZE")
    is_one = local_size is None or local_size == environment.get("WORLD_SIZE")
    return not is_one and environment.get("LOCAL_RANK") == "0" and environment.get("RANK") != "0"


def read_words(words: list[str]) -> "tuple[Config, Start | None]":
    """The config that the words describe; or that of the start which the supervisor hands over. Errors: UserError."""
    if words[:1] == [START_ON_STDIN]:
        from smoltrain.launch.config_pipe import unpack_start  # and torch with it

        start = unpack_start(sys.stdin.buffer)
        return start.config, start
    return load_config_to_train(*split_recipe_words(read_key_options(words))), None


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
