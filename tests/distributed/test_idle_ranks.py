"""Ranks without rows: how they hear of the end."""

import threading
from typing import Any

import pytest
import torch.distributed as torch_dist

from smoltrain.distributed import idle_ranks
from smoltrain.distributed.idle_ranks import await_training, end_idle_ranks
from smoltrain.distributed.world import keep_first_ranks
from smoltrain.errors import DONE, FAULT, STOPPED
from tests.ranks import Ranks, world


@pytest.fixture
def store() -> Any:
    return torch_dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]


def test_an_idle_rank_leaves_with_the_code_of_those_that_train(store: Any) -> None:
    codes: list[int] = []
    idle = [threading.Thread(target=lambda: codes.append(await_training(store, lambda: False))) for _ in range(2)]
    for thread in idle:
        thread.start()
    end_idle_ranks(store, FAULT, len(idle))
    assert store.add(idle_ranks.SEEN, 0) == 2, "rank 0 leaves after both have heard"
    for thread in idle:
        thread.join()
    assert codes == [FAULT, FAULT]


def test_after_a_signal_of_its_own_it_waits_some_time_for_the_end(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_ranks, "STOP_PATIENCE_S", 0.05)
    assert await_training(store, lambda: True) == STOPPED
    end_idle_ranks(store, DONE, 1)  # returns at once: the other has left
    assert await_training(store, lambda: True) == DONE


def shrink(size: int) -> list[Any]:
    kept = keep_first_ranks(world(), size)
    if kept is None:
        return []
    return [kept.size, kept.sum_ints(kept.rank), kept.gather(kept.rank), len(kept.machines), kept.local_size]


def test_the_first_ranks_are_a_world_of_their_own() -> None:
    three = Ranks(3)  # not those of the session, whose world is closed here
    try:
        assert three.run(shrink, 2) == [[2, [1], [0, 1], 2, 2], [2, [1], [0, 1], 2, 2], []]
    finally:
        three.close()
