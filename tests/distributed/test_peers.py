"""Ranks that hear of each other's end: three watches in this process, each as on a rank of its own."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from smoltrain.distributed import peers
from smoltrain.distributed.peers import PeerWatch
from smoltrain.distributed.verdict import Verdict
from smoltrain.errors import BAD_INPUT, DONE, FAULT

MACHINES = (0, 1, 1)
HOSTS = ("n0", "n1", "n1")
LOST = "is lost: the process has ended; the same command goes on from the last checkpoint"


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PeerWatch]]:
    """Connected and started; none ends this process."""
    monkeypatch.setattr(PeerWatch, "_end_process", lambda *_: None)
    opened = [PeerWatch(rank, MACHINES, HOSTS, 45.0) for rank in range(3)]
    told = opened[0].listen(on_loopback=True)
    for watch in opened[1:]:
        watch.connect("127.0.0.1", told)
    for watch in opened:
        watch.start()
    deadline = time.monotonic() + 10
    while len(opened[0]._connections) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    yield opened
    for watch in opened:
        watch.leave(DONE)
    for watch in opened:
        disconnect(watch)
    assert opened[0]._listener
    opened[0]._listener.close()


def disconnect(watch: PeerWatch) -> None:
    """What the end of its process does."""
    for connection in list(watch._connections):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def test_a_process_that_ends_without_a_word_is_named_to_all(watches: list[PeerWatch]) -> None:
    disconnect(watches[2])
    for watch in watches[:2]:
        assert watch.explain(10) == Verdict(FAULT, f"rank 2 on n1 {LOST}", (2,), "lost")


def test_the_end_of_rank_0_is_seen_by_all(watches: list[PeerWatch]) -> None:
    disconnect(watches[0])
    for watch in watches[1:]:
        assert watch.explain(10) == Verdict(FAULT, f"rank 0 on n0 {LOST}", (0,), "lost")


def test_a_mistake_of_one_rank_is_everybodys_exit_code(
    watches: list[PeerWatch], capsys: pytest.CaptureFixture[str]
) -> None:
    watches[2].leave(BAD_INPUT, "too wide: saw 3\ntoo long: saw 5")
    disconnect(watches[2])
    expected = Verdict(BAD_INPUT, "rank 2 on n1: too wide: saw 3\ntoo long: saw 5", (2,), "failed")
    assert [watch.explain(10) for watch in watches[:2]] == [expected] * 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: rank 2 on n1: too wide: saw 3", "error: too long: saw 5"] * 2, "one rank of each host"
    assert watches[0].has_said("too wide: saw 3\ntoo long: saw 5")


def test_whoever_says_goodbye_is_not_lost(watches: list[PeerWatch], capsys: pytest.CaptureFixture[str]) -> None:
    watches[1].leave(DONE)
    disconnect(watches[1])
    watches[0].leave(DONE)
    disconnect(watches[0])
    assert watches[2].explain(3 * peers.COLLECT_S) is None
    assert capsys.readouterr().err == ""


def test_whoever_is_to_say_it_does_so_though_it_leaves_in_good_health(
    watches: list[PeerWatch], capsys: pytest.CaptureFixture[str]
) -> None:
    disconnect(watches[2])
    assert watches[0]._judged.wait(10)
    watches[0].leave(DONE)
    assert capsys.readouterr().err == f"error: rank 2 on n1 {LOST}\n"


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b'["0000", 1]\n', b"[1]\n", b'{"leave": 2, "text": "x"}\n'])
def test_a_stranger_is_not_heard(watches: list[PeerWatch], line: bytes) -> None:
    assert watches[0]._listener
    with socket.create_connection(watches[0]._listener.getsockname()) as stranger:
        stranger.settimeout(10)
        stranger.sendall(line + b"\n")
        assert stranger.recv(1) == b"", "the connection is closed"
    assert watches[1].explain(2 * peers.COLLECT_S) is None
    assert sorted(watches[0]._connections.values()) == [1, 2]


def test_the_kernel_asks_for_as_long_as_the_recipe_says(watches: list[PeerWatch]) -> None:
    for connection in [*watches[0]._connections, *watches[1]._connections]:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        asked = [
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
        ]
        assert asked == [15, 5, 45_000]
    with socket.socket() as patient:
        peers._keep_alive(patient, 0)
        assert patient.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_a_main_thread_that_waits_for_others_is_seen() -> None:
    assert not peers._is_main_thread_waiting()
    from smoltrain.distributed import meeting

    seen: list[bool] = []
    looking = threading.Thread(target=lambda: (time.sleep(0.2), seen.append(peers._is_main_thread_waiting())))
    looking.start()
    began = time.monotonic()
    meeting.poll_until(lambda: time.monotonic() > began + 0.6)
    looking.join()
    assert seen == [True]


def test_what_is_told_is_a_port_and_a_secret() -> None:
    watch = PeerWatch(0, MACHINES, HOSTS, 45.0)
    port, token = json.loads(watch.listen(on_loopback=True))
    assert watch._listener
    assert watch._listener.getsockname() == ("127.0.0.1", port)
    assert len(token) == 32
    watch._listener.close()
