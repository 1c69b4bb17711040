"""Room for a checkpoint: whose disks are asked, for how much, who is named (full disks: whole_runs/test_disk.py)."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoltrain.checkpoint.free_space import check_room
from smoltrain.config.schema import CheckpointSection
from smoltrain.errors import UserError

Usage = namedtuple("Usage", "total used free")
MIB = 2**20


def rank_of(rank: int, num_machines: int) -> Any:
    """One of two ranks of each machine."""

    def run_here(work: Callable[[], None]) -> None:
        work()

    hosts = tuple(f"n{number // 2}" for number in range(2 * num_machines))
    is_first_of_machine = rank % 2 == 0
    return SimpleNamespace(
        rank=rank, is_first=rank == 0, is_first_of_machine=is_first_of_machine, num_machines=num_machines, hosts=hosts,
        run_on_every_rank=run_here,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "num_machines", "shared", "saw", "wanted_mib"),
    [
        (0, 1, "off", "100 MiB free,", 264),
        (0, 2, "auto", "100 MiB free on n0,", 264),
        (2, 2, "auto", None, None),  # its disk is not the run's
        (0, 2, "off", "100 MiB free on n0,", 264),
        (1, 2, "off", None, None),
        (2, 2, "off", "100 MiB free on n1,", 164),  # its ranks' half
    ],
)
def test_each_machine_that_writes_asks_its_own_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, num_machines: int, shared: Any, saw: str | None,
    wanted_mib: int | None,
) -> None:  # fmt: skip
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1, 1, 100 * MIB))
    world = rank_of(rank, num_machines)
    section = CheckpointSection(every=1, shared=shared)
    if saw is None:
        check_room(tmp_path, 200 * MIB, world, section)
        return
    with pytest.raises(UserError, match=f"the disk is nearly full: saw {saw} want {wanted_mib} MiB for the next"):
        check_room(tmp_path, 200 * MIB, world, section)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1, 1, 300 * MIB))
    check_room(tmp_path, 200 * MIB, world, section)
