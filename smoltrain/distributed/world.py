"""The world of data-parallel ranks: who am I, all-reduces and gathers of host numbers, work of rank 0.

The only importer of torch.distributed. Plain numbers go over gloo on the host, so that counting never waits for a GPU;
reduce-scatter, all-gather and all-to-all of tensors take the default group, which is NCCL on GPUs, and so do numbers
that a GPU has made and needs (gather_numbers).
"""

import contextlib
import datetime
import functools
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as torch_dist

from smoltrain.distributed.communication import CollectiveKind, CommunicationMeter, choose_reduce_scatter
from smoltrain.distributed.cpu_cores import Core, CpuShare, assign_cores, usable_cores
from smoltrain.distributed.machines import name_machines, number_machines
from smoltrain.distributed.meeting import (
    agree_on_start,
    await_first_rank,
    gather_facts,
    poll_until,
    set_network_interface,
    watch_peers,
)
from smoltrain.distributed.peers import PeerWatch
from smoltrain.distributed.rendezvous import LAUNCHER_VARIABLES, RankPlace, open_rendezvous_socket, parse_rank_place
from smoltrain.errors import Problem, TrainingStopped, UserError, mark_as_everyones

T = TypeVar("T")
# What bounds a wait is the watchdog (engine.hang_s), which knows when a job was suspended; a collective does not.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=7)
# Their names since torch 2.13, which warns of the older ones.
_reduce_scatter = getattr(torch_dist, "reduce_scatter_single", torch_dist.reduce_scatter_tensor)
_all_gather = getattr(torch_dist, "all_gather_single", torch_dist.all_gather_into_tensor)
UNBOUND_SHARE = CpuShare(1, frozenset(), "not bound")


@dataclass(frozen=True)
class World:
    """The ranks of one run. All methods but the properties are collective: every rank must call them."""

    rank: int
    size: int
    local_rank: int  # as its launcher numbers the ranks of this machine
    local_size: int  # ranks on this machine, as its kernel tells
    device: torch.device
    group: Any = None  # a gloo group for host numbers; None is the default group, gloo itself on the CPU
    cpu_share: CpuShare = UNBOUND_SHARE  # of the cores of its machine
    store: Any = None  # where the ranks have met
    machines: tuple[int, ...] = (0,)  # the machine of each rank, by number
    hosts: tuple[str, ...] = ("this machine",)  # the name of each rank's machine
    meter: CommunicationMeter = field(default_factory=CommunicationMeter)  # of the collectives of `device`
    _works: Iterator[int] = field(default_factory=itertools.count)  # numbers the calls of run_on_first_rank

    @property
    def num_machines(self) -> int:
        """On how many machines the ranks are."""
        return len(set(self.machines))

    @property
    def is_first_of_machine(self) -> bool:
        """Whether no rank of this machine has a lower number: the one that does what a machine needs once."""
        return self.machines.index(self.machines[self.rank]) == self.rank

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def sum_ints(self, *values: int) -> list[int]:
        """Each value summed over the ranks, modulo 2^64 in two's complement (what int64 addition does)."""
        return self._all_reduce(values, torch.int64, torch_dist.ReduceOp.SUM)

    def sum_floats(self, *values: float) -> list[float]:
        """Each value summed over the ranks in fp64."""
        return self._all_reduce(values, torch.float64, torch_dist.ReduceOp.SUM)

    def max_floats(self, *values: float) -> list[float]:
        """The largest of each value over the ranks."""
        return self._all_reduce(values, torch.float64, torch_dist.ReduceOp.MAX)

    def gather_numbers(self, own: torch.Tensor) -> torch.Tensor:
        """Every rank's numbers (n,), on every rank as (ranks, n): one collective for sums, maxima and the rest.

        They are where the rank computes and stay there: no host waits for a GPU. Of the default group.
        """
        if self.size == 1:
            return own.view(1, len(own))
        everyones = own.new_empty(self.size * len(own))
        self.all_gather(everyones, own)
        return everyones.view(self.size, len(own))

    def _all_reduce(self, values: tuple[Any, ...], dtype: torch.dtype, op: Any) -> list[Any]:
        tensor = torch.tensor(values, dtype=dtype)
        is_of_device = self.group is None
        with self._measure("all-reduce", tensor.nbytes) if is_of_device else contextlib.nullcontext():
            torch_dist.all_reduce(tensor, op=op, group=self.group)
        return tensor.tolist()

    def _measure(self, kind: CollectiveKind, num_bytes: int) -> contextlib.AbstractContextManager[None]:
        return self.meter.measure(kind, num_bytes, self.size)

    def reduce_scatter(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Add up every rank's `whole` (flat) into `part`: what is this rank's of it, by rank order."""
        with self._measure(choose_reduce_scatter(self.device.type), whole.nbytes):
            _reduce_scatter(part, whole)

    def all_gather(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Put every rank's `part` into `whole` (flat) by rank order."""
        with self._measure("all-gather", whole.nbytes):
            _all_gather(whole, part)

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """Send to each rank its elements of `sent` (flat), and put those of each into `received`, by rank order."""
        to_others = sum(sent_sizes) - sent_sizes[self.rank]
        with self._measure("all-to-all", to_others * sent.element_size()):
            torch_dist.all_to_all_single(received, sent, received_sizes, sent_sizes)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        torch_dist.all_gather_object(values, value, group=self.group)
        return values

    def send(self, tensor: torch.Tensor, target: int) -> None:
        """Send a tensor on the host to one rank, which receives it. Not collective."""
        torch_dist.send(tensor, target, group=self.group)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """Fill a tensor on the host with what one rank sends. Not collective."""
        torch_dist.recv(tensor, source, group=self.group)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum_ints(0)

    def run_on_first_rank(self, work: Callable[[], T], *, patient: bool = False) -> T:
        """Run `work` on rank 0 alone and give every rank its result, or raise its error on every rank.

        For work that may take hours the others are `patient`: they ask now and then, and wait in no collective.
        """
        outcome: Any = None
        done = f"work/{next(self._works)}"
        lost = contextlib.suppress(RuntimeError)  # torchrun's store, which torchrun's death has taken along
        if patient and not self.is_first:
            with lost:
                poll_until(lambda: self.store.check([done]))
        if self.is_first:
            try:
                outcome = work()
            except (UserError, TrainingStopped) as error:
                outcome = error
            except OSError as error:
                outcome = TrainingStopped(f"rank 0: {error}")
            if patient:
                with lost:
                    self.store.set(done, "")
        outcomes = [outcome]
        if self.size > 1:
            torch_dist.broadcast_object_list(outcomes, src=0, group=self.group)
        if isinstance(outcomes[0], UserError | TrainingStopped):
            raise mark_as_everyones(outcomes[0])
        return outcomes[0]

    def run_on_every_rank(self, work: Callable[[], T]) -> T:
        """Each rank's own result of `work`, or, if it fails on one, that one's error on every rank."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except (UserError, TrainingStopped) as error:
            failure = error
        for rank, error in enumerate(self.gather(failure)):
            if error:
                raise mark_as_everyones(error, rank)
        return result


def choose_device(
    asked: Literal["auto", "cuda", "cpu", "mps"] = "auto", local_rank: int = 0, local_size: int = 1
) -> torch.device:
    """The device of a rank; auto takes CUDA if there is any, else the CPU. Errors: UserError for one it lacks."""
    cuda = torch.cuda.is_available()
    there = {"auto": True, "cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}
    if not there[asked]:
        have = ", ".join(name for name, here in there.items() if here)
        raise UserError(Problem("this machine has no such device", asked, f"one of {have}", "engine.device"))
    if asked == "auto":
        asked = "cuda" if cuda else "cpu"
    if asked == "cuda" and local_size > torch.cuda.device_count():  # each rank says so, before any waits for another
        saw = f"{local_size} ranks on a machine, {torch.cuda.device_count()} GPUs that each of them may use"
        change = "the number of ranks; under srun, --gpus-per-node in the place of --gpus-per-task"
        raise UserError(Problem("a rank would have no GPU", saw, "a GPU for each", change))
    return torch.device(asked, local_rank) if asked == "cuda" else torch.device(asked)


def open_world(
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto", lost_host_s: float | None = None
) -> World:  # fmt: skip
    """Join the process group that the launcher's environment describes; a bare `python` is a world of one.

    With `lost_host_s` this process ends when another rank is lost (peers.py); that is after so many seconds for a host
    that has gone without a word.
    Errors: UserError for a device that this machine does not have, or an environment that makes no sense.
    """
    here = parse_rank_place(os.environ)
    own = choose_device(device, here.local_rank, here.local_size if here.is_local_told else 1)
    store, port = _open_store(here)
    facts = gather_facts(store, here, port)
    machines = number_machines(facts)
    set_network_interface(store, here, facts, machines)
    hosts = name_machines(facts, machines)
    if lost_host_s is not None and here.size > 1:
        watch_peers(store, here, PeerWatch(here.rank, machines, hosts, lost_host_s), machines, hosts)
    for key, value in {  # which DeepSpeed asks for
        "RANK": here.rank,
        "WORLD_SIZE": here.size,
        "LOCAL_RANK": here.local_rank,
        "MASTER_ADDR": here.address,
        "MASTER_PORT": port,
    }.items():
        os.environ.setdefault(key, str(value))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    world = World(here.rank, here.size, here.local_rank, 1, own, store=store, machines=machines, hosts=hosts)
    world = _open_group(world)
    # Else DeepSpeed starts `numactl` at each reduction of ZeRO-3 on a CPU, to count what the launcher did not tell it.
    os.environ.setdefault("LOCAL_SIZE", str(world.local_size))
    return world


def _open_group(world: World) -> World:
    """The same world, when its ranks have met: with its groups, and what the ranks of a machine share."""
    cuda = world.device.type == "cuda"
    torch_dist.init_process_group(
        "nccl" if cuda else "gloo", store=world.store, rank=world.rank, world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=world.device if cuda else None,  # else NCCL guesses it at the first barrier, and warns of that
    )  # fmt: skip
    group = torch_dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if cuda else None
    world = replace(world, group=group)
    cores_beside = _gather_cores_of_this_machine(world)
    cpu_share = _find_cpu_share(cores_beside, world.rank)
    torch.set_num_threads(cpu_share.threads)
    return replace(world, local_size=len(cores_beside), cpu_share=cpu_share)


def keep_first_ranks(world: World, size: int) -> World | None:
    """A world of the first ranks of this one, which is closed; None on the others. Collective.

    Who watches over the ranks (peers.py) goes on watching over all.
    """
    world.barrier()  # what was said last has reached all
    close_world()
    if world.rank >= size:
        return None
    os.environ["WORLD_SIZE"] = str(size)  # which DeepSpeed asks for
    prefix_store = torch_dist.PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    store = prefix_store(f"first {size}", world.store)
    machines = world.machines[:size]
    hosts = world.hosts[:size]
    return _open_group(replace(world, size=size, store=store, machines=machines, hosts=hosts, _works=itertools.count()))


def close_world() -> None:
    """Leave the process group, if there is one, so that the same process can open another world."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def is_world_open() -> bool:
    """Whether this process has joined a process group, ours or somebody else's."""
    return torch_dist.is_initialized()


def _open_store(here: RankPlace) -> tuple[Any, int]:
    """(the store in which all ranks meet, its port). Errors: UserError if the port is taken or rank 0 does not come."""
    if here.has_launcher_store:
        await_first_rank(here)
        os.environ["MASTER_ADDR"] = here.reachable_address  # which the next line reads
        env = torch_dist.rendezvous  # pyright: ignore[reportPrivateImportUsage]
        store, *_ = next(env("env://", here.rank, here.size, timeout=COLLECTIVE_TIMEOUT))
        prefix_store = torch_dist.PrefixStore  # pyright: ignore[reportPrivateImportUsage]
        return prefix_store(agree_on_start(store, here), store), here.port or 0
    if here.size == 1 and here.port is None:
        return torch_dist.HashStore(), free_port()  # pyright: ignore[reportPrivateImportUsage]
    tcp_store = torch_dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    make = functools.partial(tcp_store, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False)
    if here.rank == 0:
        listener = open_rendezvous_socket(here) if here.listener is None else socket.socket(fileno=here.listener)
        address, port = listener.getsockname()[:2]
        address = here.address if here.is_on_one_machine else "127.0.0.1"
        store = make(address, port, here.size, True, master_listen_fd=listener.detach())
    else:
        port = here.port or 0
        await_first_rank(here)
        store = make(here.reachable_address, port, here.size, False)
    return store, port


def _gather_cores_of_this_machine(world: World) -> dict[int, list[Core]]:
    """Each rank on this machine -> the cores that it may use. Collective."""
    everyones = world.gather(usable_cores())
    here = world.machines[world.rank]
    return {rank: cores for rank, cores in enumerate(everyones) if world.machines[rank] == here}


def _find_cpu_share(cores_beside: dict[int, list[Core]], rank: int) -> CpuShare:
    """This rank's part of the cores of its machine. Errors: UserError for SMOLTRAIN_THREADS."""
    asked = os.environ.get("SMOLTRAIN_THREADS") or None
    if asked and not (asked.isdecimal() and int(asked)):
        raise UserError(
            Problem(
                what="no number of threads",
                saw=repr(asked),
                want="a whole number, 1 or more",
                change="the environment variable SMOLTRAIN_THREADS",
            )
        )
    place = list(cores_beside).index(rank)
    return assign_cores(list(cores_beside.values()), place, int(asked) if asked else None)


def environment_without_launcher() -> dict[str, str]:
    """This process's environment variables, but for those by which a launcher tells its ranks who they are."""
    return {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
