"""By which network interface other machines reach this one.

gloo listens at the address that the machine's own name resolves to. Debian and its kin write that name beside 127.0.1.1
into /etc/hosts, where no other machine gets: then the interface of the way to rank 0 is the right one.
"""

import ipaddress
import os
import socket

import psutil

from smoltrain.distributed.machines import RankFacts
from smoltrain.errors import Problem

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # of torch and NCCL: names of interfaces


def is_loopback(address: str) -> bool:
    """Whether an address is one that only this machine reaches."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def find_address_of_name() -> str | None:
    """The address at which gloo would listen: the first of the own name's that is this machine's; None without one."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(where)
        except OSError:
            continue
        return str(where[0])
    return None


def find_source_address(target: str) -> str:
    """The own address on the way to a machine, by the routes of the kernel; "" if there is no way. Sends nothing."""
    try:
        found = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(where)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return ""


def find_interface(address: str) -> str | None:
    """The name of the network interface that has this address, if there is one."""
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.address.partition("%")[0] == address.partition("%")[0]:
                return name
    return None


def find_own_address() -> str:
    """Where other machines reach this one: at the interface that gloo is to take, else by its own name."""
    asked = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in psutil.net_if_addrs().get(asked, []):
            if entry.family == family:
                return entry.address
    return find_address_of_name() or "127.0.0.1"


def choose_interface(facts: list[RankFacts], machines: tuple[int, ...], rank: int) -> tuple[str, str] | Problem | None:
    """(the interface to take, why), for a rank that other machines cannot find by its own name.

    None where they can, or where GLOO_SOCKET_IFNAME says which one; a Problem if no interface leads to them.
    """
    own = facts[rank]
    asked = os.environ.get("GLOO_SOCKET_IFNAME")
    if asked:
        return _check_asked_interface(asked, own.host)
    named = find_address_of_name()
    if named and not is_loopback(named):
        return None
    leads_to = named or "nothing"
    address = own.address
    if not address or is_loopback(address):  # on rank 0's machine, whose name leads to itself too
        others = [fact for fact, machine in zip(facts, machines, strict=True) if machine != machines[rank]]
        ways = [find_source_address(fact.address) for fact in others if fact.address and not is_loopback(fact.address)]
        address = next((way for way in ways if way), "")
    interface = find_interface(address) if address else None
    if interface is None or is_loopback(address):
        return Problem(
            what=f"other machines cannot reach {own.host}",
            saw=f"its own name leads to {leads_to}, and no interface of it leads to them",
            want="a host name that resolves to an address which the other machines reach, on every machine",
            change=f"/etc/hosts of {own.host}, or the environment variable GLOO_SOCKET_IFNAME there",
        )
    why = f"its own name leads to {leads_to}, where no other machine reaches it; gloo and NCCL take {interface}"
    return interface, f"{own.host}: {why} ({address}), the way to them"


def _check_asked_interface(asked: str, host: str) -> Problem | None:
    """What is wrong with GLOO_SOCKET_IFNAME, one name or several, with commas between."""
    there = psutil.net_if_addrs()
    for name in asked.split(","):
        if name not in there:
            want = f"one of {', '.join(sorted(there))}"
            change = "the environment variable GLOO_SOCKET_IFNAME"
            return Problem(f"{host} has no such network interface", repr(name), want, change)
    return None
