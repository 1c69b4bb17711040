"""What machines with run folders of their own are sent (on real hosts: tests/whole_runs/test_hosts.py)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoltrain.run import private_folders
from smoltrain.run.private_folders import find_unseen_ranks
from tests import tiny
from tests.ranks import world


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


def copied(paths: list[Path]) -> list[str | None]:
    """Send each file from rank 0's folder to that of rank 1, whose name has one letter more."""
    here = world()
    theirs = [path.with_name(path.name + "1") if here.rank else path for path in paths]
    return [here.copy_file(path, 0, 1) for path in theirs]


def test_a_file_comes_as_it_was_or_the_fault_is_told(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    content = bytes(range(256)) * (1 << 17)  # two chunks
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "blocked").write_bytes(content)
    (tmp_path / "blocked1.part").mkdir()
    sent, faults = ranks(2).run(copied, [tmp_path / name for name in ("empty", "large", "blocked")])
    assert sent == [None] * 3
    assert faults[:2] == [None] * 2
    assert "Is a directory" in faults[2]
    assert [(tmp_path / name).read_bytes() for name in ("empty1", "large1")] == [b"", content]
    assert not (tmp_path / "large1.part").exists()
