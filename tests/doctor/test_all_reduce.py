"""Two real ranks: that meet, that cannot, of which one hangs, of which one adds up wrong."""

import subprocess
import time

import psutil
import pytest

from smoltrain.doctor import all_reduce, child
from smoltrain.doctor.all_reduce import check_all_reduce
from tests import preloaded


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "PYTHON", [str(preloaded.programs() / "python"), "-P"])


def test_two_ranks_add_up() -> None:
    found = check_all_reduce("cpu")
    assert found.status == "ok", found
    assert found.saw.startswith("2 ranks over gloo on the loopback: right sums, ")


def test_an_interface_that_is_not_there_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    found = check_all_reduce("cpu")
    assert found.status == "fault"
    assert found.saw.endswith("ended with code 1: RuntimeError: Unable to find address for: ib7")
    assert "GLOO_SOCKET_IFNAME" in found.advice


def test_a_rank_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    start = all_reduce.start_child

    def start_first_alone(words: list[str], environment: dict[str, str], handles: tuple[int, ...]) -> object:
        if environment["RANK"] == "1":
            words = ["-S", "-c", "import time; time.sleep(600)"]
        return start(words, environment, handles)

    monkeypatch.setattr(all_reduce, "start_child", start_first_alone)
    before = set(psutil.Process().children(recursive=True))
    found = check_all_reduce("cpu", limit_s=0.3)
    assert (found.status, found.saw) == ("fault", "rank 0 of 2 over gloo on the loopback: no answer within 0.3 s")
    deadline = time.monotonic() + 20
    while [p for p in set(psutil.Process().children(recursive=True)) - before if p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, "somebody is left"
        time.sleep(0.01)


def test_when_one_has_failed_the_other_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    start = all_reduce.start_child
    wait = all_reduce.await_child

    def start_failing(words: list[str], environment: dict[str, str], handles: tuple[int, ...]) -> object:
        code = {"0": "import sys; sys.exit('no luck')", "1": "import time; time.sleep(600)"}[environment["RANK"]]
        return start(["-S", "-c", code], environment, handles)

    def await_and_note(process: subprocess.Popen[str], limit_s: float) -> child.ChildResult:
        limits.append(limit_s)
        return wait(process, limit_s)

    monkeypatch.setattr(all_reduce, "start_child", start_failing)
    monkeypatch.setattr(all_reduce, "await_child", await_and_note)
    monkeypatch.setattr(all_reduce, "GRACE_S", 0.1)
    assert check_all_reduce("cpu", limit_s=100.0).saw.endswith("the process ended with code 1: no luck")
    assert limits == [100.0, 0.1]


def test_wrong_sums_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    result = child.ChildResult(0, '{"right": false, "latency_s": 1, "bytes_s": 1}\n', "")
    monkeypatch.setattr(all_reduce, "run_two_ranks", lambda device, limit_s: [result, result])
    assert check_all_reduce("cpu").saw == "the sums of 2 ranks over gloo on the loopback are wrong"
