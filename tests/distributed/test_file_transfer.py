"""A file that goes from rank to rank."""

from pathlib import Path
from typing import Any

from smoltrain.distributed.file_transfer import copy_file
from tests.ranks import world


def copied(paths: list[Path]) -> list[str | None]:
    """Send each file from rank 0's folder to that of rank 1, whose name has one letter more."""
    here = world()
    theirs = [path.with_name(path.name + "1") if here.rank else path for path in paths]
    return [copy_file(here, path, 0, 1) for path in theirs]


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
