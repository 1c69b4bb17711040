"""Marks in the run's folders, which every machine must read (on real hosts: tests/whole_runs/test_hosts.py)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoltrain.errors import UserError, find_origin_of_all
from smoltrain.run import shared_folder
from tests import tiny


def world_that_sees(unseen: list[str | None], num_machines: int = 2) -> Any:
    """Rank 0 of a world whose ranks do not see these folders."""
    return SimpleNamespace(
        num_machines=num_machines, is_first=True, hosts=("n0", "n1", "n1"), run_on_first_rank=lambda work: work(),
        gather=lambda own: [own, *unseen],
    )  # fmt: skip


def test_who_does_not_see_which_folder_is_told_and_no_mark_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.load(tmp_path)
    (config.run_folder / "checkpoints").mkdir(parents=True)
    shared_folder.check_shared_folder(config, world_that_sees([None, None]))
    with pytest.raises(UserError, match=r"saw n1 does not see /x, want a folder that all machines share") as caught:
        shared_folder.check_shared_folder(config, world_that_sees(["/x", "/x"]))
    assert find_origin_of_all(caught.value) == 0
    assert not [path for path in config.run.folder.rglob("*") if path.is_file()]
    shared_folder.check_shared_folder(config, world_that_sees(["/x", "/x"], num_machines=1))


def test_every_folder_of_the_run_that_is_there_gets_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.load(tmp_path)
    (config.run_folder / "checkpoints").mkdir(parents=True)
    marks = shared_folder._write_marks([config.run.folder, config.run_folder, config.run_folder / "none"])
    assert [path.parent for path in marks] == [config.run.folder, config.run_folder]

    def unseen() -> list[str | None]:
        return [shared_folder._find_unseen(path, text) for path, text in marks.items()]

    assert unseen() == [None, None]
    list(marks)[1].write_text("another")
    assert unseen() == [None, str(config.run_folder)]
    next(iter(marks)).unlink()
    assert unseen() == [str(config.run.folder), str(config.run_folder)]
