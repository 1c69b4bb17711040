"""Ranks of real training that start in a moment and may be killed: forked from a process that imported everything.

The process is itself one of `preloaded.programs`, so that a test session imports torch and deepspeed for both once.

    life = zygote().train(words, 2, log, files_stop, "rename", 1)
    life.kill(0)

The ranks are processes like those of a launcher, each with its own memory, signals and end; only the ten seconds in
which torch and deepspeed are imported are shared. Nothing here restarts or cleans up, as no launcher is there.
"""

import atexit
import ctypes
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, Literal

from tests import preloaded

State = int | Literal["runs", "stopped"]  # an int is the exit code; negative: the number of the signal that ended it
TIMEOUT_S = 120.0
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class Life:
    """Some ranks of one run, from their fork to the end of the last one."""

    def __init__(self, zygote: "Zygote", pids: list[int], log: Path) -> None:
        self._zygote, self._pids, self.log = zygote, pids, log

    def states(self) -> list[State]:
        """What each rank does now, in rank order."""
        return self._zygote.ask("states", self._pids)

    def wait(self, until: Callable[[list[State]], bool], timeout_s: float = TIMEOUT_S) -> list[State]:
        """The states when they are so first. Errors: TimeoutError, after all ranks were killed."""
        deadline = time.monotonic() + timeout_s
        while not until(states := self.states()):
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the ranks are {states} after {timeout_s:g} s\n{self.text()[-4000:]}")
            time.sleep(0.005)
        return states

    def end(self, timeout_s: float = TIMEOUT_S) -> list[State]:
        """The exit codes, when the last rank has left."""
        return self.wait(lambda states: all(isinstance(state, int) for state in states), timeout_s)

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these ranks; without arguments to all."""
        self._signal(signal.SIGKILL, ranks)

    def resume(self, *ranks: int) -> None:
        """Let stopped ranks go on; without arguments all."""
        self._signal(signal.SIGCONT, ranks)

    def text(self) -> str:
        """What the ranks have printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _signal(self, number: int, ranks: tuple[int, ...]) -> None:
        states = self.states()
        for rank in ranks or range(len(self._pids)):
            if not isinstance(states[rank], int):  # the zygote reaps in `states` alone, so the pid is still this rank's
                os.kill(self._pids[rank], number)


class Zygote:
    """The process that ranks are forked from. It ends, and its ranks with it, when this one does."""

    def __init__(self) -> None:
        key = multiprocessing.current_process().authkey
        with tempfile.TemporaryDirectory(prefix="zygote-") as folder:
            address = str(Path(folder) / "socket")
            with Listener(address, "AF_UNIX", authkey=key) as listener:
                words = [preloaded.programs() / "python", "-m", "tests.start_zygote", address]
                self._process = subprocess.Popen(words, stdin=subprocess.PIPE, cwd=preloaded.ROOT)
                assert self._process.stdin is not None
                self._process.stdin.write(key)
                self._process.stdin.close()
                self._end = listener.accept()

    def fork(self, size: int, log: Path, function: Callable[..., int | None], *args: Any) -> Life:
        """function(*args) in `size` new processes with the environment of ranks; its result is the exit code.

        The function and its arguments are pickled. Their output goes to the end of `log`.
        """
        return Life(self, self.ask("fork", size, log, function, args), log)

    def train(self, words: list[str], size: int, log: Path, *sabotage: Any) -> Life:
        """Ranks of launch/train.py with these words, each of which calls sabotage[0](*sabotage[1:]) first."""
        return self.fork(size, log, _train, words, *sabotage)

    def ask(self, request: str, *args: Any) -> Any:
        """The zygote's answer."""
        self._end.send((request, args))
        if not self._end.poll(TIMEOUT_S):
            raise TimeoutError(f"no answer to {request!r} within {TIMEOUT_S:g} s")
        return self._end.recv()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@functools.cache
def zygote() -> Zygote:
    """The one of this test session."""
    started = Zygote()
    atexit.register(started.close)
    return started


def serve(end: Connection) -> None:
    """Fork ranks and tell of them, until nobody asks."""
    from smoltrain.distributed.world import free_port

    ended: dict[int, int] = {}
    while True:
        try:
            request, args = end.recv()
        except EOFError:
            return
        if request == "states":
            end.send([ended[pid] if pid in ended else _state(pid, ended) for pid in args[0]])
            continue
        size, log, function, words = args
        assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork would lose the other threads"
        port, pids = free_port(), []
        sys.stdout.flush()  # else each rank would write it once more
        sys.stderr.flush()
        for rank in range(size):
            if pid := os.fork():
                ended.pop(pid, None)  # of a rank that had this number before
                pids.append(pid)
            else:
                end.close()
                _be_rank(rank, size, port, log, function, words)
        del args, words  # may hold the ranks' ends of pipes: they are to close when the rank is gone
        end.send(pids)


def _state(pid: int, ended: dict[int, int]) -> State:
    changed, status = os.waitpid(pid, os.WNOHANG)
    if changed:
        return ended.setdefault(pid, os.waitstatus_to_exitcode(status))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "stopped" if fields[0] == "T" else "runs"


def _be_rank(rank: int, size: int, port: int, log: Path, function: Callable[..., int | None], args: tuple) -> None:
    """Never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SMOLTRAIN_THREADS="1",
        )  # fmt: skip
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = function(*args) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(words: list[str], *sabotage: Any) -> int:
    from smoltrain.launch.rank import run_rank

    if sabotage:
        sabotage[0](*sabotage[1:])
    return run_rank(["quickstart", *words])
