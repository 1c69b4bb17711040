"""What a launcher's environment variables say, and where the ranks of one machine listen."""

import ipaddress
import socket
from typing import Any

import psutil
import pytest

from smoltrain.distributed import world as world_module
from smoltrain.distributed.rendezvous import RankPlace, open_rendezvous_socket, parse_rank_place
from smoltrain.errors import RankUserError
from tests.ranks import world

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29400", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, RankPlace()),
        (TORCHRUN, RankPlace(5, 8, 1, 4, "10.0.0.7", 29400, has_launcher_store=True)),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"}, RankPlace()),  # left over
        ({"LOCAL_RANK": "1", "LOCAL_SIZE": "8"}, RankPlace()),
        ({"WORLD_SIZE": " 2 ", "MASTER_ADDR": ""}, RankPlace(0, 2, 0, 2, is_local_told=False)),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "MASTER_PORT": "5"},
            RankPlace(1, 2, 0, 1, port=5, is_local_told=False),
        ),
    ],
)  # fmt: skip
def test_a_rank_knows_its_place(environment: dict[str, str], expected: RankPlace) -> None:
    assert parse_rank_place(environment) == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": ""}, "RANK makes no sense: saw '', want a whole number, 0, as WORLD_SIZE is 1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK makes no sense: saw 'one', want a whole number, 0 to 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK makes no sense: saw '2', want a whole number, 0 to 1, as WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE makes no sense: saw '', want a whole number, 1 or more; change the env"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE makes no sense: saw '0'"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE makes no sense"),
        ({"WORLD_SIZE": "1e2"}, "WORLD_SIZE makes no sense"),
        ({"LOCAL_RANK": "2", "WORLD_SIZE": "2"}, "LOCAL_RANK makes no sense: saw '2', want a whole number, 0 to 1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK makes no sense"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK makes no sense"),
        ({"LOCAL_WORLD_SIZE": "8", "RANK": "0"}, "LOCAL_WORLD_SIZE makes no sense"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT makes no sense: saw 'http', want a whole number, 1 to 65535"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "nothing tells where rank 0 is: saw RANK=1, no MASTER_PORT"),
    ],
)  # fmt: skip
def test_variables_that_make_no_sense_are_one_line(environment: dict[str, str], said: str) -> None:
    with pytest.raises(RankUserError) as caught:
        parse_rank_place(environment)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_children_hear_nothing_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = (*TORCHRUN, "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_RANK", "CROSS_SIZE", "OMPI_COMM_WORLD_RANK")
    for name in theirs:
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("GROUP_PROJECT", "mine")
    seen = world_module.environment_without_launcher()
    assert not [name for name in theirs if name in seen]
    assert seen["GROUP_PROJECT"] == "mine"


@pytest.mark.parametrize(("address", "alone"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_what_is_to_be_met_on_the_loopback_listens_there_alone(address: str, alone: bool) -> None:
    with open_rendezvous_socket(RankPlace(address=address)) as listener:
        host, port = listener.getsockname()[:2]
        assert ipaddress.ip_address(host).is_loopback == alone
        assert host in ("127.0.0.1", "::1") or host in ("0.0.0.0", "::")
        socket.create_connection((address, port), timeout=5).close()


@pytest.mark.parametrize(
    ("place", "is_on_one"),
    [
        (RankPlace(size=2, local_size=2, address="localhost"), True),
        (RankPlace(size=2, local_size=1, address="localhost"), False),  # as rank 0's own name may lead to itself
        (RankPlace(size=2, local_size=2, address="127.0.0.1", is_local_told=False), True),
        (RankPlace(size=2, local_size=2, address="localhost", is_local_told=False), False),
        (RankPlace(address="no-such-host.invalid"), False),
    ],
)
def test_a_name_that_leads_to_the_loopback_may_mean_it_on_one_machine_alone(place: RankPlace, is_on_one: bool) -> None:
    assert place.is_on_one_machine == is_on_one


def test_a_machine_that_does_not_know_its_own_name_is_at_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "own.invalid")
    assert RankPlace(address="own.invalid").reachable_address == "127.0.0.1"
    assert RankPlace(address="other.invalid").reachable_address == "other.invalid"
    assert RankPlace(address="localhost").reachable_address == "localhost"


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RankUserError, match=f"saw {port} at 127.0.0.1: Address already in use, want one that"):
            open_rendezvous_socket(RankPlace(port=port))


def listening() -> list[tuple[str, str]]:
    world().barrier()
    return [(c.laddr.ip, c.status) for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]


def test_no_socket_of_a_rank_can_be_reached_from_another_machine(ranks: Any) -> None:
    for sockets in ranks(2).run(listening):
        assert sockets, "gloo listens"
        assert all(ipaddress.ip_address(address).is_loopback for address, _ in sockets), sockets


def test_one_process_meets_nobody_and_listens_nowhere() -> None:
    store, _ = world_module._open_store(RankPlace())
    store.set("here", "1")
    assert store.check(["here"])
    assert type(store).__name__ == "HashStore", "which is memory of this process"


# ---- two processes that nobody launched


SLOW = """
import datetime, time
from smoltrain.distributed import world as world_module
world_module.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=2)
world = world_module.open_world("cpu")
print(world.run_on_first_rank(lambda: time.sleep(5) or "done", patient=True), flush=True)
"""


@pytest.mark.slow
def test_work_of_the_first_rank_may_take_longer_than_a_collective() -> None:
    from tests.distributed.test_world import start

    port = {"WORLD_SIZE": "2", "MASTER_PORT": str(world_module.free_port())}
    both = [start(SLOW, RANK=str(rank), LOCAL_RANK=str(rank), **port) for rank in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert out == "done\n", err
