"""Run functions on N real gloo ranks: one set of processes for a whole test session, not one per test.

    def test_sum(ranks):
        assert ranks(2).run(add_ranks, 10) == [11, 11]

The function must be importable (module level) and return something that can be pickled; it runs once on every rank.
"""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 240.0


class Ranks:
    """N processes in one process group, waiting for functions to run."""

    def __init__(self, size: int, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(size)]
        self._ends = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) on every rank at once; the results in rank order. Raises the first rank's error."""
        for end in self._ends:
            end.send((function, args))
        results, errors = [], []
        for rank, end in enumerate(self._ends):
            if not end.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S:g} s")
            ok, value = end.recv()
            (results if ok else errors).append(value)
        if errors:
            raise errors[0]
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(end: Connection, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SMOLTRAIN_THREADS="1", WANDB_SILENT="true",
    )  # fmt: skip
    while True:
        function, args = end.recv()
        try:
            end.send((True, function(*args)))
        except Exception as error:
            text = traceback.format_exc()
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:
                error = RuntimeError(text)
            error.add_note(f"on rank {rank}:\n{text}")
            end.send((False, error))


_worlds: dict[int, Any] = {}


def world() -> Any:
    """The World of the rank that asks; opened once per process."""
    from smoltrain.distributed.world import open_world

    if not _worlds:
        _worlds[0] = open_world()
    return _worlds[0]
