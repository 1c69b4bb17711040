"""Run functions on N real gloo ranks: one set of processes for a whole test session, not one per test.

    def test_sum(ranks):
        assert ranks(2).run(add_ranks, 10) == [11, 11]

The function must be importable (module level) and return something that can be pickled; it runs once on every rank.
What it leaves behind in its process is put back before the next one (`left_as_found`), so that the order of tests
does not matter. The processes are forked from the zygote, which has imported torch and deepspeed once for all.
"""

import gc
import os
import pickle
import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.zygote import zygote

TIMEOUT_S = 240.0


class Ranks:
    """N processes in one process group, waiting for functions to run."""

    def __init__(self, size: int) -> None:
        pairs = [Pipe() for _ in range(size)]
        self._ends = [ours for ours, _ in pairs]
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        log = Path(self._folder.name) / "log"
        self._life = zygote().fork(size, log, _serve, [theirs for _, theirs in pairs])
        for _, theirs in pairs:
            theirs.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) on every rank at once; the results in rank order. Raises the first rank's error."""
        for end in self._ends:
            end.send((function, args))
        results, errors = [], []
        for rank, end in enumerate(self._ends):
            if not end.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S:g} s\n{self._life.text()[-4000:]}")
            try:
                ok, value = end.recv()
            except EOFError as error:
                raise RuntimeError(f"rank {rank} has died\n{self._life.text()[-4000:]}") from error
            (results if ok else errors).append(value)
        if errors:
            raise errors[0]
        return results

    def close(self) -> None:
        """End the processes."""
        self._life.kill()
        self._folder.cleanup()


def _serve(ends: list[Connection]) -> None:
    """Be one of these ranks. It ends with the session, killed or because nobody is left at the other end."""
    os.environ["WANDB_SILENT"] = "true"
    own = int(os.environ["RANK"])
    for rank, end in enumerate(ends):
        if rank != own:
            end.close()
    end = ends[own]
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            return
        with left_as_found():
            answer = _answer(function, args)
        end.send(answer)


def _answer(function: Callable[..., Any], args: tuple) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(text)
        error.add_note(f"on rank {os.environ['RANK']}:\n{text}")
        error.__traceback__ = None  # its frames would keep the engine alive
        return False, error


@contextmanager
def left_as_found() -> Iterator[None]:
    """Afterwards the process is as before: what a test sets for itself is not there for the next one."""
    import numpy
    import torch

    environment = dict(os.environ)
    folder = Path.cwd()
    warned: Any = warnings  # whose filters are typed as if they never changed
    filters = list(warned.filters)
    linear = torch.nn.functional.linear  # ZeRO-3 puts its own there, which rounds biases otherwise, and leaves it
    dtype = torch.get_default_dtype()
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warned.filters[:] = filters
    torch.nn.functional.linear = linear
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    torch.compiler.reset()  # the limits of recompilation are counted per process
    gc.enable()
    gc.collect()  # the engine, which is a cycle: else it is let go within a later test
    gc.freeze()  # what is left are libraries: to look through them each time took 0.2 s


_worlds: dict[int, Any] = {}


def world() -> Any:
    """The World of the rank that asks; opened once per process."""
    from smoltrain.distributed.world import open_world

    if not _worlds:
        _worlds[0] = open_world()
    return _worlds[0]
