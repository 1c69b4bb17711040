"""What machines with run folders of their own are sent (on real hosts: tests/whole_runs/test_hosts.py)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoltrain.run import private_folders
from smoltrain.run.private_folders import find_unseen_ranks
from tests import tiny


def test_only_what_is_missing_or_another_is_sent(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    digests = private_folders._hash_files([tmp_path / "data", tmp_path / "none"])
    assert private_folders._find_missing(digests) == []
    (tmp_path / "data" / "a").write_text("x")
    (tmp_path / "data" / "c").unlink()
    assert [Path(name).name for name in private_folders._find_missing(digests)] == ["a", "c"]


@pytest.mark.parametrize(("shared", "unseen"), [("auto", set()), ("off", {1, 2})])
def test_whose_logs_cannot_be_read(tmp_path: Path, shared: str, unseen: set[int]) -> None:
    ranks: Any = SimpleNamespace(rank=3, machines=(0, 1, 1, 0))
    assert find_unseen_ranks(tiny.load(tmp_path, f"checkpoint.shared={shared}"), ranks) == unseen
