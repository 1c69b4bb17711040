"""Make parts of the tokens in several processes, none of which outlives the one that started them."""

import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from smoltrain.config.schema import DataSection
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.token_parts import PartCount, TokeniseJob, TokenPart
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import TrainingStopped

_job: TokeniseJob | None = None  # of a worker


class _WorkerProcess(SpawnProcess):
    """A process that does not run the file of the main program again, which may be a script that trains.

    By default a spawned process imports that file, for what it may need of it; a worker needs nothing.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _WorkerContext(SpawnContext):
    """A fork would inherit locks of threads that it does not have."""

    Process = _WorkerProcess


SPAWN = _WorkerContext()


def tokenise_in_processes(job: TokeniseJob, todo: list[int], num_processes: int, tokenizer_folder: Path) -> None:
    """Make these parts of a job, whose tokenizer was saved in a folder; its counts are kept up to date meanwhile.

    Errors: those of `TokeniseJob.tokenise_part`; TrainingStopped if a process is killed. All of them have ended then.
    """
    shared = SPAWN.RawArray("q", job.counts.ravel().tolist())
    job.counts = _view_counts(shared)
    alive, ours = SPAWN.Pipe(duplex=False)  # nothing is ever sent; it breaks when we close it, or die
    tokenizer = (tokenizer_folder, job.tokenizer.separator, job.tokenizer.pad)
    num_threads = max(1, num_cores() // num_processes)
    arguments = (job.data, job.parts, shared, tokenizer, num_threads, alive)
    executor = ProcessPoolExecutor(num_processes, SPAWN, _init_worker, arguments)
    try:
        for future in as_completed([executor.submit(_tokenise_part, number) for number in todo]):
            future.result()
        executor.shutdown()
    except BrokenProcessPool:
        what = "a process that tokenises was killed, perhaps for want of memory"
        raise TrainingStopped(f"{what}; the same command goes on with the parts that are done") from None
    finally:
        ours.close()
        executor.shutdown(cancel_futures=True)
        alive.close()


def _init_worker(
    data: DataSection,
    parts: list[TokenPart],
    shared: Any,
    tokenizer: tuple[Path, str, str | None],
    num_threads: int,
    alive: Connection,
) -> None:
    """In each process, before its first part."""
    global _job  # noqa: PLW0603 (an initializer can hand over its work in no other way)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the one that started us ends us
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()
    _job = TokeniseJob(data, Tokenizer.from_folder(*tokenizer), parts, _view_counts(shared), ReaderHealth())


def _tokenise_part(number: int) -> None:
    assert _job is not None
    with report_progress(None, _job.health):
        _job.tokenise_part(number)


def _exit_with_parent(alive: Connection) -> None:
    """End this process, whatever it is doing, when the other end of the pipe is closed."""
    alive.poll(None)
    os._exit(1)


def _view_counts(shared: Any) -> np.ndarray:
    return np.frombuffer(shared, np.int64).reshape(-1, len(PartCount))
