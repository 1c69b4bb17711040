"""Flat tensors that ranks sum up and spread: the same numbers through shared memory and by collectives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import world

NUMEL = 12  # of 1, 2 and 3 ranks


def there_and_back(shares: bool, dtype: torch.dtype, times: int) -> list[tuple[str, list[float], list[float]]]:
    """(how, this rank's part of the sum, the whole of it) of `times` tensors in turn; runs on every rank."""
    from smoltrain.engine import shared_tensor

    here = world()
    with pytest.MonkeyPatch.context() as patch:
        if not shares:
            patch.setattr(shared_tensor, "_reserve_shared_memory", lambda _: None)
        one, results = shared_tensor.SharedTensor(here, NUMEL, dtype), []
    assert not one.own.any()
    for n in range(times):
        one.own.copy_(torch.arange(NUMEL) * (here.rank + 1) + n)
        part = one.reduce_scatter().clone()
        one.all_gather()
        results.append((one.how, part.tolist(), one.own.tolist()))
        here.barrier()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("size", "shares", "how"), [
    (1, True, "no communication (one rank)"), (2, True, "through shared memory"), (3, True, "through shared memory"),
    (2, False, "by collectives"), (3, False, "by collectives"),
])  # fmt: skip
def test_parts_are_sums_over_the_ranks(ranks: Any, size: int, shares: bool, how: str, dtype: torch.dtype) -> None:
    whole = [[sum(i * (rank + 1) + n for rank in range(size)) for i in range(NUMEL)] for n in range(3)]
    width = NUMEL // size
    for rank, results in enumerate(ranks(size).run(there_and_back, shares, dtype, 3)):
        assert [seen for seen, *_ in results] == [how] * 3
        assert [part for _, part, _ in results] == [row[rank * width : (rank + 1) * width] for row in whole]
        assert [own for *_, own in results] == whole


def deceived() -> tuple[str, list[float]]:
    """On a rank for which every path of /proc leads to its own memory, as in two containers that count alike."""
    from smoltrain.engine import shared_tensor

    here, real = world(), torch.from_file
    with pytest.MonkeyPatch.context() as patch:
        own: list[str] = []
        patch.setattr(shared_tensor, "_reserve_shared_memory", _remember(shared_tensor._reserve_shared_memory, own))
        patch.setattr(torch, "from_file", lambda path, **how: real(own[0], **how))
        one = shared_tensor.SharedTensor(here, NUMEL, torch.float32)
    one.own.fill_(here.rank + 1)
    return one.how, one.reduce_scatter().tolist()


def _remember(reserve: Callable[[int], int | None], paths: list[str]) -> Callable[[int], int | None]:
    def reserve_and_note(num_bytes: int) -> int | None:
        handle = reserve(num_bytes)
        paths.append(f"/proc/self/fd/{handle}")
        return handle

    return reserve_and_note


def test_memory_that_only_looks_shared_is_not_used(ranks: Any) -> None:
    assert ranks(2).run(deceived) == [("by collectives", [3.0] * (NUMEL // 2))] * 2


def handles() -> tuple[bool, int, int]:
    """(whether memory is shared, open files before and after); runs on every rank."""
    from smoltrain.engine.shared_tensor import SharedTensor

    before = len(list(Path("/proc/self/fd").iterdir()))
    tensors = [SharedTensor(world(), NUMEL, torch.float32) for _ in range(3)]
    return (
        all(one.how == "through shared memory" for one in tensors),
        before,
        len(list(Path("/proc/self/fd").iterdir())),
    )


def test_nothing_is_left_for_a_kill_to_leave_behind(ranks: Any) -> None:
    before = set(Path("/dev/shm").iterdir())
    for shared, first, last in ranks(2).run(handles):
        assert shared
        assert first == last
    assert not {path for path in set(Path("/dev/shm").iterdir()) - before if "smoltrain" in path.name}


def test_room_that_is_not_there_is_no_crash_later() -> None:
    from smoltrain.engine.shared_tensor import _reserve_shared_memory

    assert _reserve_shared_memory(1 << 60) is None


def test_ranks_of_gpus_take_the_collectives_of_their_group() -> None:
    from smoltrain.distributed.world import World
    from smoltrain.engine.shared_tensor import _map_shared_memory

    two = World(0, 2, 0, 2, torch.device("cuda", 0))
    assert _map_shared_memory(two, NUMEL, torch.float32) == [], "nor do they ask each other"
