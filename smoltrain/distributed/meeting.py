"""Before there is a group: ranks meet in a store, tell each other who they are, and choose how to reach each other."""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from smoltrain.distributed.machines import RankFacts, identify_kernel
from smoltrain.distributed.network import (
    INTERFACE_VARIABLES,
    choose_interface,
    find_interface,
    find_own_address,
    find_source_address,
)
from smoltrain.distributed.peers import PeerWatch, open_peer_watch
from smoltrain.distributed.rendezvous import RankPlace
from smoltrain.errors import Problem, RankUserError, UserError

RENDEZVOUS_TIMEOUT_S = 1800.0  # for all ranks to come
READ_TIMEOUT_S = 10.0  # for all ranks to read what all have written, before rank 0 may leave with the store
SAY_S = (10.0, 60.0)  # until a rank says whom it waits for, and between one such line and the next


def agree_on_start(store: Any, here: RankPlace) -> str:
    """A prefix for the keys of this start of the ranks alone, in a store that torchrun keeps for all of its restarts.

    Whatever earlier ranks have written is still there, and no variable tells one start from another where hosts come
    and go. So each rank writes a number that nobody had before, and rank 0 answers it with the name of the start.
    """
    own = secrets.token_hex(8)
    name = own

    def answer_all() -> bool:
        for rank in [rank for rank in missing if store.check([f"hello/{rank}"])]:
            hello = store.get(f"hello/{rank}").decode()
            if answered.get(rank) != hello:  # perhaps an earlier one's, in which case the right one is to come
                answered[rank] = hello
                store.set(f"welcome/{rank}", f"{hello} {own}")
            if store.check([f"{own}/entered/{rank}"]):
                missing.discard(rank)
        return not missing

    def is_answered() -> bool:
        return store.check([key]) and store.get(key).decode().startswith(f"{own} ")

    if here.rank == 0:
        missing = set(range(1, here.size))
        answered: dict[int, str] = {}
        poll_until(answer_all, lambda: f"rank 0 of {here.size} waits for {len(missing)} ranks")
    else:
        key = f"welcome/{here.rank}"
        store.set(f"hello/{here.rank}", own)
        poll_until(is_answered)
        name = store.get(key).decode().split()[1]
        store.set(f"{name}/entered/{here.rank}", "")
    return name


def await_first_rank(here: RankPlace) -> None:
    """Return when somebody listens where rank 0's store is to be. Errors: UserError if nobody ever does."""

    def describe_wait() -> str:
        try:
            socket.getaddrinfo(here.reachable_address, None)
            why = ""
        except OSError:
            why = f", a name that does not resolve on {socket.gethostname()}"
        return f"rank {here.rank} waits for rank 0 at {here.address}:{here.port}{why}"

    poll_until(lambda: _is_first_rank_listening(here), describe_wait)


def gather_facts(store: Any, here: RankPlace, port: int) -> list[RankFacts]:
    """What each rank tells of itself, in rank order; all have come then. Errors: UserError if one does not come."""
    address = find_source_address(here.reachable_address) if here.size > 1 else ""
    first_of_node = here.rank - here.local_rank if here.is_local_told else None
    local_rank = here.local_rank if here.is_local_told else None
    facts = RankFacts(socket.gethostname(), identify_kernel(), first_of_node, local_rank, address)
    return [RankFacts.from_text(text) for text in exchange_texts(store, here, "here", facts.to_text(), port)]


def exchange_texts(store: Any, here: RankPlace, topic: str, text: str, port: int | None = None) -> list[str]:
    """Every rank's text, in rank order, without a group. A rank 0 that waits says for whom, if a `port` is given."""
    keys = [f"{topic}/{rank}" for rank in range(here.size)]
    store.set(keys[here.rank], text)
    missing = set(range(here.size))

    def are_all_here() -> bool:
        missing.difference_update([rank for rank in missing if store.check([keys[rank]])])
        return not missing

    def describe_wait() -> str:
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, sorted(missing)))}"
        return f"rank {here.rank} of {here.size} waits for {ranks} at {here.address}:{port}"

    poll_until(are_all_here, describe_wait if here.rank == 0 and port is not None else None)
    texts = [store.get(key).decode() for key in keys]
    num_read = store.add(f"{topic}/read", 1)
    deadline = time.monotonic() + READ_TIMEOUT_S
    while here.rank == 0 and num_read < here.size and time.monotonic() < deadline:  # the store may be this process's
        time.sleep(0.002)
        num_read = store.add(f"{topic}/read", 0)
    return texts


def set_network_interface(store: Any, here: RankPlace, facts: list[RankFacts], machines: tuple[int, ...]) -> None:
    """Tell gloo and NCCL which interface to take, where they would take one on which ranks cannot meet.

    Errors: UserError, the same on every rank, which names each machine that has none.
    """
    if here.size == 1 or len(set(machines)) == 1:
        name = find_interface("127.0.0.1") if here.is_on_one_machine else None
        if name:  # what others cannot reach, they cannot attack
            _set_interface_variables(name)
        return
    chosen = choose_interface(facts, machines, here.rank)
    is_first_of_machine = machines.index(machines[here.rank]) == here.rank
    fault = chosen if isinstance(chosen, Problem) and is_first_of_machine else None
    _raise_everyones(store, here, "interface", fault)
    if isinstance(chosen, tuple):
        name, why = chosen
        _set_interface_variables(name)
        if is_first_of_machine:
            print(why, flush=True)


def watch_peers(
    store: Any, here: RankPlace, watch: PeerWatch, machines: tuple[int, ...], hosts: tuple[str, ...]
) -> None:  # fmt: skip
    """Connect every rank with rank 0. Errors: UserError, the same on every rank, where one cannot be reached."""
    is_one_machine = len(set(machines)) == 1
    told = ""
    if here.rank == 0:
        address = "127.0.0.1" if is_one_machine else find_own_address()
        told = json.dumps([address, watch.listen(on_loopback=is_one_machine)])
    address, told = json.loads(exchange_texts(store, here, "peers", told)[0])
    fault = None
    if here.rank:
        try:
            watch.connect(address, told)
        except OSError as error:
            port = json.loads(told)[0]
            fault = Problem(
                what=f"rank {here.rank} on {hosts[here.rank]} cannot reach rank 0 on {hosts[0]}",
                saw=f"{address} port {port}: {error}",
                want="every port open between the machines of a run, which their kernels choose",
                change="the firewall, or GLOO_SOCKET_IFNAME if this is not the network that they share",
            )
    _raise_everyones(store, here, "connected", fault, most=3)
    open_peer_watch(watch)
    watch.start()


def _raise_everyones(store: Any, here: RankPlace, topic: str, fault: Problem | None, most: int | None = None) -> None:
    """Errors: UserError, the same on every rank, where any of them has a fault; it names so many at most."""
    texts = exchange_texts(store, here, topic, json.dumps(vars(fault) if fault else None))
    problems = [Problem(**json.loads(text)) for text in texts if json.loads(text)]
    if problems:
        raise UserError(*problems[:most])


def _set_interface_variables(name: str) -> None:
    for variable in INTERFACE_VARIABLES:
        os.environ.setdefault(variable, name)


def _is_first_rank_listening(here: RankPlace) -> bool:
    """Whether somebody listens where rank 0 is to be."""
    try:
        socket.create_connection((here.reachable_address, here.port or 0), timeout=5.0).close()
    except OSError:
        return False
    return True


def poll_until(there: Callable[[], bool], waits: Callable[[], str] | None = None) -> None:
    """Return when it is `there`. A rank that `waits` says so, and gives up after RENDEZVOUS_TIMEOUT_S.

    Errors: UserError then.
    """
    began, pause, say_at = time.monotonic(), 0.002, time.monotonic() + SAY_S[0]
    while not there():
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)
        if waits and time.monotonic() > say_at:
            say_at = time.monotonic() + SAY_S[1]
            print(f"{waits()} (MASTER_ADDR and MASTER_PORT); without WORLD_SIZE one process trains alone", flush=True)
        if waits and time.monotonic() > began + RENDEZVOUS_TIMEOUT_S:
            saw = f"{waits()} for {RENDEZVOUS_TIMEOUT_S:.0f} s"
            want = "all ranks to be started, or no WORLD_SIZE for a run of one process"
            raise RankUserError(Problem("not all ranks have come", saw, want, "the launcher's environment variables"))
