"""Who a rank is and where all ranks meet, as a launcher's environment variables tell; nothing here touches torch."""

import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from smoltrain.errors import Problem, RankUserError

# Prefixes of the variables by which launchers tell ranks who they are: torchrun, deepspeed, mpirun, `smoltrain train`.
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_", "CROSS_",
    "OMPI_COMM_WORLD_", "PMI_", "SMOLTRAIN_SUPERVISOR", "SMOLTRAIN_LISTENER",
)  # fmt: skip


@dataclass(frozen=True)
class RankPlace:
    """A rank's place in its world, and the address of the store in which all of them meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # as the launcher says, which checks local_rank; World counts the ranks of a machine itself
    address: str = "127.0.0.1"
    port: int | None = None  # None: rank 0 takes any that is free
    has_launcher_store: bool = False  # the store is torchrun's own
    listener: int | None = None  # the file descriptor of a socket that listens there already
    is_local_told: bool = True  # whether the launcher tells LOCAL_RANK and LOCAL_WORLD_SIZE; some tell neither

    @property
    def is_on_one_machine(self) -> bool:
        """Whether all ranks must be on this machine: where they meet, no other can come.

        A name may lead to the loopback on rank 0's machine alone, so a launcher must say that all ranks are here.
        """
        if self.is_local_told and self.local_size != self.size:
            return False
        try:
            if not self.is_local_told and self.size > 1:
                return ipaddress.ip_address(self.address).is_loopback
            found = socket.getaddrinfo(self.address, None)
        except (OSError, ValueError):
            return False
        return all(ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback for *_, where in found)

    @property
    def reachable_address(self) -> str:
        """Where rank 0 is, from here: a machine whose own name does not resolve is itself at the loopback."""
        try:
            socket.getaddrinfo(self.address, None)
        except OSError:
            if self.address == socket.gethostname():
                return "127.0.0.1"
        return self.address


def parse_rank_place(environment: Mapping[str, str]) -> RankPlace:
    """What the variables say; a bare `python` is a world of one. Errors: RankUserError for one that makes no sense."""
    size = _parse_number(environment, "WORLD_SIZE", 1, 1)
    rank = _parse_number(environment, "RANK", 0, 0, size - 1, f"WORLD_SIZE is {size}")
    of_machine = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
    if "RANK" in environment or "WORLD_SIZE" in environment:
        local_size = _parse_number(environment, of_machine, size, 1, size, f"WORLD_SIZE is {size}")
        local_rank = _parse_number(environment, "LOCAL_RANK", 0, 0, local_size - 1, f"{of_machine} is {local_size}")
    else:  # left over: nobody launched this process
        _parse_number(environment, "LOCAL_RANK", 0, 0)
        local_rank, local_size = 0, 1
    is_local_told = size == 1 or ("LOCAL_RANK" in environment and of_machine in environment)
    if rank and "MASTER_PORT" not in environment:
        raise RankUserError(
            Problem(
                what="nothing tells where rank 0 is",
                saw=f"RANK={rank}, no MASTER_PORT",
                want="a launcher, which sets both, or neither for a run of one process",
                change="the environment variables of launchers",
            )
        )
    return RankPlace(
        rank, size, local_rank, local_size, environment.get("MASTER_ADDR") or "127.0.0.1",
        _parse_number(environment, "MASTER_PORT", 0, 1, 65535) or None,
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "RANK" in environment,
        _parse_number(environment, "SMOLTRAIN_LISTENER", -1, 0) if "SMOLTRAIN_LISTENER" in environment else None,
        is_local_told,
    )  # fmt: skip


def _parse_number(
    environment: Mapping[str, str], name: str, default: int, least: int, most: int | None = None, because: str = ""
) -> int:
    if name not in environment:
        return default
    text = environment[name].strip()
    if text.isascii() and text.isdecimal() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    allowed = f"{least} or more" if most is None else f"{least} to {most}" if least != most else str(least)
    want = f"a whole number, {allowed}" + (f", as {because}" if because else "")
    change = f"the environment variable {name}, which launchers set: unset it for a run of one process"
    raise RankUserError(Problem(f"{name} makes no sense", repr(environment[name]), want, change))


def open_rendezvous_socket(place: RankPlace) -> socket.socket:
    """A socket on which rank 0's store is to be met: on the loopback alone, if that is the address; else everywhere.

    Errors: RankUserError if the port is taken.
    """
    has_both = socket.has_dualstack_ipv6()
    dual_stack = has_both and not place.is_on_one_machine
    if place.is_on_one_machine:
        family, *_ = socket.getaddrinfo(place.address, None)[0]
        address = (place.address, place.port or 0)
    else:
        family = socket.AF_INET6 if has_both else socket.AF_INET
        address = ("", place.port or 0)
    try:
        return socket.create_server(address, family=family, backlog=128, dualstack_ipv6=dual_stack)
    except OSError as error:
        raise RankUserError(
            Problem(
                what="the port where ranks would meet cannot be used",
                saw=f"{place.port} at {place.address}: {os.strerror(error.errno or 0)}",
                want="one that is free",
                change="the environment variable MASTER_PORT",
            )
        ) from None
