"""Flat tensors that ranks sum up and spread: the same numbers through shared memory and by collectives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import world

NUMEL = 12  # of 1, 2 and 3 ranks
HERE = "/dev/shm"


def there_and_back(memory: str, dtype: torch.dtype, times: int) -> list[tuple[str, list[float], list[float]]]:
    """(how, this rank's part of the sum, the whole of it) of `times` tensors in turn; runs on every rank."""
    from smoltrain import flat

    flat.SHARED_MEMORY = Path(memory)
    here = world()
    one, results = flat.Flat(here, NUMEL, dtype), []
    assert not one.own.any()
    for n in range(times):
        one.own.copy_(torch.arange(NUMEL) * (here.rank + 1) + n)
        part = one.reduce_scatter().clone()
        one.all_gather()
        results.append((one.how, part.tolist(), one.own.tolist()))
        here.barrier()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("size", "memory", "how"), [
    (1, HERE, "nothing travels"), (2, HERE, "through shared memory"), (3, HERE, "through shared memory"),
    (2, "/not/there", "by collectives"), (3, "/not/there", "by collectives"),
])  # fmt: skip
def test_parts_are_sums_over_the_ranks(ranks: Any, size: int, memory: str, how: str, dtype: torch.dtype) -> None:
    whole = [[sum(i * (rank + 1) + n for rank in range(size)) for i in range(NUMEL)] for n in range(3)]
    width = NUMEL // size
    for rank, results in enumerate(ranks(size).run(there_and_back, memory, dtype, 3)):
        assert [seen for seen, *_ in results] == [how] * 3
        assert [part for _, part, _ in results] == [row[rank * width : (rank + 1) * width] for row in whole]
        assert [own for *_, own in results] == whole


def names_there() -> list[str]:
    """Files of ours in shared memory while two tensors are in use; runs on every rank."""
    from smoltrain import flat

    flat.SHARED_MEMORY = Path(HERE)
    tensors = [flat.Flat(world(), NUMEL, torch.float32) for _ in range(2)]
    world().barrier()
    found = [path.name for path in Path(HERE).glob("smoltrain-*")]
    assert all(one.how == "through shared memory" for one in tensors)
    return found


def test_no_file_is_left_for_a_kill_to_leave_behind(ranks: Any) -> None:
    assert ranks(2).run(names_there) == [[], []]


def without_room() -> tuple[bool, str]:
    from smoltrain import flat

    flat.SHARED_MEMORY = Path(HERE)
    return flat._reserved(1 << 60) is None, flat.Flat(world(), NUMEL, torch.float32).how


def test_room_that_is_not_there_is_no_crash_later(ranks: Any) -> None:
    assert ranks(2).run(without_room) == [(True, "through shared memory")] * 2
    assert not list(Path(HERE).glob("smoltrain-*"))
