"""Ranks that meet in a store: who waits says so, and a start reads nothing of an earlier one."""

import threading
import time
from typing import Any

import pytest
import torch

from smoltrain.distributed import meeting
from smoltrain.distributed.rendezvous import RankPlace
from smoltrain.errors import RankUserError


def test_whoever_waits_says_for_whom_and_leaves_at_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "SAY_S", (0.05, 0.2))
    monkeypatch.setattr(meeting, "RENDEZVOUS_TIMEOUT_S", 0.3)
    with pytest.raises(RankUserError, match=r"saw rank 0 of 2 waits for rank 1 at \S+:5 for 0 s, want all ranks"):
        meeting.poll_until(lambda: False, lambda: "rank 0 of 2 waits for rank 1 at 127.0.0.1:5")
    said = capsys.readouterr().out.splitlines()
    assert len(said) in (1, 2)
    assert said[0].startswith("rank 0 of 2 waits for rank 1 at 127.0.0.1:5 (MASTER_ADDR and MASTER_PORT); ")
    meeting.poll_until(lambda: True, lambda: "nobody")
    assert capsys.readouterr().out == ""


def test_a_rank_waits_as_long_as_the_docs_say() -> None:
    assert (meeting.SAY_S[0], meeting.RENDEZVOUS_TIMEOUT_S) == (10, 30 * 60)


def test_a_start_reads_nothing_of_an_earlier_one_in_a_store_that_stays() -> None:
    """torchrun's store outlives the ranks: the second start finds every key of the first one."""
    tcp_store = torch.distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    store = tcp_store("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = None
    for attempt in ("first", "second"):
        entered: dict[int, Any] = {}

        def connect() -> Any:
            return tcp_store("127.0.0.1", store.port, is_master=False, wait_for_workers=False)

        def named(client: Any, rank: int) -> Any:
            place = RankPlace(rank, 3, has_launcher_store=True)
            return torch.distributed.PrefixStore(meeting.agree_on_start(client, place), client)  # pyright: ignore[reportPrivateImportUsage]

        def enter(rank: int, entered: dict[int, Any] = entered) -> None:
            entered[rank] = named(connect(), rank)

        others = [threading.Thread(target=enter, args=(rank,)) for rank in (1, 2)]
        if attempt == "second":  # rank 0 comes first, and finds the greetings of before
            threading.Timer(0.1, lambda started=others: [one.start() for one in started]).start()
        else:
            for one in others:
                one.start()
        enter(0)
        deadline = time.monotonic() + 10
        while len(entered) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        entered[1].set("key", attempt)
        assert [entered[rank].get("key").decode() for rank in range(3)] == [attempt] * 3
        before = before or entered[0]
        assert before.get("key").decode() == "first"
