"""Which interface leads to other machines, where a machine's own name leads to itself."""

import socket

import psutil
import pytest

from smoltrain.distributed import network
from smoltrain.distributed.machines import RankFacts
from smoltrain.errors import Problem

[LOOPBACK] = (name for name, found in psutil.net_if_addrs().items() if "127.0.0.1" in [one.address for one in found])


def facts(*addresses: str) -> list[RankFacts]:
    return [RankFacts(f"n{n}", str(n), n, 0, address) for n, address in enumerate(addresses)]


def choose(monkeypatch: pytest.MonkeyPatch, named: str | None, *addresses: str, rank: int = 0) -> object:
    """What a rank takes on a machine whose eth0 has 10.0.0.0, where its own name leads to `named`."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(network, "find_address_of_name", lambda: named)
    monkeypatch.setattr(network, "find_source_address", lambda _: "10.0.0.0")
    monkeypatch.setattr(network, "find_interface", {"10.0.0.0": "eth0", "10.0.0.1": "eth1"}.get)
    return network.choose_interface(facts(*addresses), tuple(range(len(addresses))), rank)


def test_a_name_that_others_reach_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, "10.0.0.0", "10.0.0.0", "10.0.0.1") is None


@pytest.mark.parametrize(("named", "leads_to"), [("127.0.1.1", "127.0.1.1"), (None, "nothing")])
def test_a_name_that_leads_nowhere_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, named: str | None, leads_to: str
) -> None:
    own = f"n1: its own name leads to {leads_to}, where no other machine reaches it; gloo and NCCL take eth1 (10.0.0.1)"
    assert choose(monkeypatch, named, "127.0.0.1", "10.0.0.1", rank=1) == ("eth1", f"{own}, the way to them")
    first = choose(monkeypatch, named, "127.0.0.1", "10.0.0.1")  # rank 0's machine: its way to rank 0 is the loopback
    assert isinstance(first, tuple)
    assert first[0] == "eth0"


def test_no_way_to_the_others_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = choose(monkeypatch, "127.0.1.1", "127.0.0.1", "")
    assert isinstance(problem, Problem)
    said = "other machines cannot reach n0: saw its own name leads to 127.0.1.1, and no interface of it leads to them"
    assert str(problem).startswith(said)


def test_an_interface_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{LOOPBACK},ib7")
    problem = network.choose_interface(facts("", ""), (0, 1), 1)
    assert str(problem).startswith("n1 has no such network interface: saw 'ib7', want one of ")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", LOOPBACK)
    assert network.choose_interface(facts("", ""), (0, 1), 1) is None
    assert network.find_own_address() == "127.0.0.1"


def test_addresses_and_interfaces_are_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.find_source_address("127.0.0.1") == "127.0.0.1"
    assert network.find_source_address("no-such-host.invalid") == ""
    assert network.find_interface("127.0.0.1") == LOOPBACK
    assert network.find_interface("192.0.2.1") is None
    assert [network.is_loopback(address) for address in ("127.0.1.1", "::1", "10.0.0.1", "fe80::1%eth0")] == [
        True, True, False, False,
    ]  # fmt: skip
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert network.find_address_of_name() is None
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert network.is_loopback(str(network.find_address_of_name()))
