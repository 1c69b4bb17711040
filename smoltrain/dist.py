"""The world of data-parallel ranks: who am I, how do we add up numbers, does anybody want to stop.

The only importer of torch.distributed. Plain numbers travel over gloo on the host, so that counting never waits for
a GPU; tensors are DeepSpeed's business.
"""

import contextlib
import datetime
import functools
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as torch_dist

from smoltrain import cores, rendezvous
from smoltrain.errors import INTERRUPTED, STOPPED, Problem, RankRefused, TrainingStopped, UserError
from smoltrain.rendezvous import Place

T = TypeVar("T")
# What bounds a wait is the watchdog (engine.hang_s), which knows when a job was suspended; a collective does not.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=7)
MEET_S = 1800.0  # for all ranks to come
SAY_S = (10.0, 60.0)  # until a rank says whom it waits for, and between one such line and the next
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ECHO_S = 0.5  # launchers pass on a Ctrl-C that the terminal has sent to their ranks already: no second one
LOOK_S = 1.0  # between two looks at whether the launchers live
# Their names since torch 2.13, which warns of the older ones.
_reduce_scatter = getattr(torch_dist, "reduce_scatter_single", torch_dist.reduce_scatter_tensor)
_all_gather = getattr(torch_dist, "all_gather_single", torch_dist.all_gather_into_tensor)
NOT_ASKED = cores.Share(1, frozenset(), "not bound")
DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"


@dataclass(frozen=True)
class World:
    """The ranks of one run. All methods but the properties are collective: every rank must call them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    group: Any = None  # a gloo group for host numbers; None is the default group, gloo itself on the CPU
    share: cores.Share = NOT_ASKED  # of the cores of its machine
    store: Any = None  # where the ranks have met
    _works: Iterator[int] = field(default_factory=itertools.count)  # of on_first

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def sum_ints(self, *values: int) -> list[int]:
        """Each value summed over the ranks, modulo 2^64 in two's complement (what int64 addition does)."""
        return self._reduce(values, torch.int64, torch_dist.ReduceOp.SUM)

    def sum_floats(self, *values: float) -> list[float]:
        """Each value summed over the ranks in fp64."""
        return self._reduce(values, torch.float64, torch_dist.ReduceOp.SUM)

    def max_floats(self, *values: float) -> list[float]:
        """The largest of each value over the ranks."""
        return self._reduce(values, torch.float64, torch_dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[Any, ...], dtype: torch.dtype, op: Any) -> list[Any]:
        tensor = torch.tensor(values, dtype=dtype)
        torch_dist.all_reduce(tensor, op=op, group=self.group)
        return tensor.tolist()

    def reduce_scatter(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Add up every rank's `whole` (flat) into `part`: what is this rank's of it, by rank order."""
        _reduce_scatter(part, whole)

    def all_gather(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Put every rank's `part` into `whole` (flat) by rank order."""
        _all_gather(whole, part)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        torch_dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum_ints(0)

    def on_first(self, work: Callable[[], T], *, patient: bool = False) -> T:
        """Run `work` on rank 0 alone and give every rank its result, or raise its error on every rank.

        For work that may take hours the others are `patient`: they ask now and then, and wait in no collective.
        """
        outcome: list[Any] = [None]
        done = f"work/{next(self._works)}"
        lost = contextlib.suppress(RuntimeError)  # torchrun's store, which torchrun's death has taken along
        if patient and not self.is_first:
            with lost:
                _look_for(lambda: self.store.check([done]))
        if self.is_first:
            try:
                outcome = [work()]
            except (UserError, TrainingStopped) as error:
                outcome = [error]
            except OSError as error:
                outcome = [TrainingStopped(f"rank 0: {error}")]
            if patient:
                with lost:
                    self.store.set(done, "")
        torch_dist.broadcast_object_list(outcome, src=0, group=self.group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def together(self, work: Callable[[], T]) -> T:
        """Each rank's own result of `work`, or, if it fails on one, that one's error on every rank."""
        result, failure = None, None
        try:
            result = work()
        except (UserError, TrainingStopped) as error:
            failure = error
        if found := next((error for error in self.gather(failure) if error), None):
            raise found
        return result  # pyright: ignore[reportReturnType]


def choose_device(asked: Literal["auto", "cuda", "cpu", "mps"] = "auto", local_rank: int = 0) -> torch.device:
    """The device of a rank; auto takes CUDA if there is any, else the CPU. Errors: UserError for one it lacks."""
    cuda = torch.cuda.is_available()
    there = {"auto": True, "cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}
    if not there[asked]:
        have = ", ".join(name for name, here in there.items() if here)
        raise UserError(Problem("this machine has no such device", asked, f"one of {have}", "engine.device"))
    if asked == "auto":
        asked = "cuda" if cuda else "cpu"
    return torch.device(asked, local_rank) if asked == "cuda" else torch.device(asked)


def open(device: Literal["auto", "cuda", "cpu", "mps"] = "auto") -> World:
    """Join the process group that the launcher's environment describes; a bare `python` is a world of one.

    Errors: UserError for a device that this machine does not have, or an environment that makes no sense.
    """
    here = rendezvous.place(os.environ)
    own = choose_device(device, here.local_rank)
    if here.on_one_machine and (name := rendezvous.loopback_name()):  # what others cannot reach, they cannot attack
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    store, port = _meet(here)
    for key, value in {  # which DeepSpeed asks for
        "RANK": here.rank,
        "WORLD_SIZE": here.size,
        "LOCAL_RANK": here.local_rank,
        "MASTER_ADDR": here.address,
        "MASTER_PORT": port,
    }.items():
        os.environ.setdefault(key, str(value))
    cuda = own.type == "cuda"
    if cuda:
        torch.cuda.set_device(own)
    torch_dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=here.rank, world_size=here.size, timeout=COLLECTIVE_TIMEOUT
    )
    group = torch_dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if cuda else None
    world = World(here.rank, here.size, here.local_rank, here.local_size, own, group, store=store)
    world = replace(world, share=_share(world))
    torch.set_num_threads(world.share.threads)
    return world


def _meet(here: Place) -> tuple[Any, int]:
    """(the store in which all ranks have met, its port). Errors: UserError if the port is taken or nobody comes."""
    if here.kept_by_launcher:
        env = torch_dist.rendezvous  # pyright: ignore[reportPrivateImportUsage]
        store, *_ = next(env("env://", here.rank, here.size, timeout=COLLECTIVE_TIMEOUT))
        return store, here.port or 0
    if here.size == 1 and here.port is None:
        return torch_dist.HashStore(), free_port()  # pyright: ignore[reportPrivateImportUsage]
    tcp_store = torch_dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    make = functools.partial(tcp_store, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False)
    if here.rank == 0:
        listener = rendezvous.listen(here) if here.listener is None else socket.socket(fileno=here.listener)
        address, port = listener.getsockname()[:2]
        address = here.address if here.on_one_machine else "127.0.0.1"
        store = make(address, port, here.size, True, master_listen_fd=listener.detach())
    else:
        port = here.port or 0
        _look_for(lambda: _answers(here), lambda: f"rank {here.rank} waits for rank 0 at {here.address}:{port}")
        store = make(here.address, port, here.size, False)
    store.set(f"here/{here.rank}", "")
    missing = set(range(here.size))

    def all_here() -> bool:
        missing.difference_update([rank for rank in missing if store.check([f"here/{rank}"])])
        return not missing

    def whom() -> str:
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, sorted(missing)))}"
        return f"rank {here.rank} of {here.size} waits for {ranks} at {here.address}:{port}"

    _look_for(all_here, whom if here.rank == 0 else None)
    return store, port


def _answers(here: Place) -> bool:
    """Whether somebody listens where rank 0 is to be."""
    try:
        socket.create_connection((here.address, here.port or 0), timeout=5.0).close()
    except OSError:
        return False
    return True


def _look_for(there: Callable[[], bool], waits: Callable[[], str] | None = None) -> None:
    """Return when it is `there`; a rank that `waits` says so, and leaves after MEET_S. Errors: UserError then."""
    began, pause, say_at = time.monotonic(), 0.002, time.monotonic() + SAY_S[0]
    while not there():
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)
        if waits and time.monotonic() > say_at:
            say_at = time.monotonic() + SAY_S[1]
            print(f"{waits()} (MASTER_ADDR and MASTER_PORT); without WORLD_SIZE one process trains alone", flush=True)
        if waits and time.monotonic() > began + MEET_S:
            saw = f"{waits()} for {MEET_S:.0f} s"
            want = "all ranks to be started, or no WORLD_SIZE for a run of one process"
            raise RankRefused(Problem("not all ranks have come", saw, want, "the launcher's environment variables"))


def _share(world: World) -> cores.Share:
    """This rank's part of the cores of its machine. Collective. Errors: UserError for SMOLTRAIN_THREADS."""
    asked = os.environ.get("SMOLTRAIN_THREADS") or None
    if asked and not (asked.isdecimal() and int(asked)):
        want, change = "a whole number, 1 or more", "the environment variable SMOLTRAIN_THREADS"
        raise UserError(Problem("no number of threads", repr(asked), want, change))
    host = socket.gethostname()
    beside = {rank: theirs for rank, (name, theirs) in enumerate(world.gather((host, cores.usable()))) if name == host}
    return cores.share(list(beside.values()), list(beside).index(world.rank), int(asked) if asked else None)


def environment() -> dict[str, str]:
    """This process's environment variables, but for those by which a launcher tells its ranks who they are."""
    return {key: value for key, value in os.environ.items() if not key.startswith(rendezvous.OF_LAUNCHERS)}


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_signals() -> tuple[signal.Signals, ...]:
    """What asks this process to stop; not SIGHUP where it is ignored, as `nohup` has it, and children inherit."""
    ignores = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (number == signal.SIGHUP and ignores))


class StopFlag:
    """Remembers that this rank was asked to stop; the loop adds the flags of all ranks up at each step.

    Some launchers signal their ranks one after another, seconds apart, so no rank may act on its own flag alone. A rank
    whose launcher has died will never be signalled: that counts as a request. As torchrun hides the exit codes of its
    ranks, a request is also noted in the file that SMOLTRAIN_ASKED names, if it names one (launch/slurm.sbatch).

    Until `is_raised` is asked for the first time there is nothing to lose: a signal just ends the process, and so does
    a launcher's death, without which the ranks might wait for each other for ever.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._interrupted = 0.0  # when, in seconds of the monotonic clock
        self._next_look = 0.0  # for launchers, likewise
        self._listening = threading.Event()
        self._noted = "SMOLTRAIN_ASKED" not in os.environ
        # A bare `nohup python` has no launcher and may outlive its shell.
        self._launchers = _launchers() if "LOCAL_RANK" in os.environ else []
        self._signals = stop_signals()
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)
        if self._launchers:
            threading.Thread(target=self._leave_with_launcher, name="launcher", daemon=True).start()

    def _leave_with_launcher(self) -> None:
        while not self._listening.wait(LOOK_S):
            if self._is_abandoned():
                self._note()
                os._exit(STOPPED)

    def _is_abandoned(self) -> bool:
        """Whether one of those that would pass a signal on is gone."""
        return any(_parent(child) != parent for child, parent in self._launchers)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now - self._interrupted > ECHO_S:
                os._exit(INTERRUPTED)  # the second Ctrl-C: leave at once; a checkpoint in the making stays a .tmp
            self._interrupted = self._interrupted or now

    def is_raised(self) -> bool:
        """Whether this rank has a reason to stop."""
        if not self._listening.is_set():
            self._listening.set()
            for number in self._signals:
                signal.signal(number, self._on_signal)
        if not self.reason and time.monotonic() >= self._next_look:  # a look costs 0.1 ms, and steps may be short
            self._next_look = time.monotonic() + LOOK_S
            self.reason = "its launcher is gone" if self._is_abandoned() else ""
        if self.reason:
            self._note()
        return bool(self.reason)

    def _note(self) -> None:
        if not self._noted:
            self._noted = True
            with contextlib.suppress(OSError):
                Path(os.environ["SMOLTRAIN_ASKED"]).touch()


def _launchers() -> list[tuple[int, int | None]]:
    """(process, its parent) from this rank upwards: links that hold as long as all of its launchers live.

    `smoltrain train` (SMOLTRAIN_SUPERVISOR is its process) is all that stands above its ranks. DeepSpeed's launcher
    stands under a runner, and a signal to the runner ends nothing but the runner. None stands for the parent of a
    process that was an orphan before anybody looked.
    """
    if supervisor := os.environ.get("SMOLTRAIN_SUPERVISOR"):
        return [(os.getpid(), int(supervisor))]
    links: list[tuple[int, int | None]] = []
    child = os.getpid()
    while True:
        parent = _parent(child)
        words = _command_line(parent)
        adopted = parent == 1 and sys.argv[0] not in " ".join(words).split()  # launchers name what they launch
        links.append((child, None if adopted else parent))
        if DEEPSPEED_LAUNCHER not in words:
            return links
        child = parent


def _parent(pid: int) -> int:
    """The process id of a process's parent; -1 if the process is gone."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return -1


def _command_line(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []
