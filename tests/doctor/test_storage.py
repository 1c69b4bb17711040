"""Disks that are full, read-only, small, or no folder at all; each is a real one."""

from pathlib import Path

import pytest

from smoltrain.doctor import storage
from smoltrain.doctor.check import Check, Finding, run_check
from smoltrain.doctor.storage import check_disk
from tests.doctor.faulty import find_in_child, mount_tmpfs, needs_namespaces
from tests.doctor.test_limits import needs


def on_disk(disk: Path, options: str, with_recipe: bool) -> Finding:
    mount_tmpfs(disk, options)
    found = check_disk("run.folder", disk / "runs" / "new", (lambda: needs(1)) if with_recipe else None)
    assert not list(disk.iterdir()), "nothing is left"
    return found


@needs_namespaces
@pytest.mark.parametrize(
    ("options", "with_recipe", "status", "said"),
    [
        ("size=1m", False, "fault", "cannot be written: No space left on device"),
        ("ro,size=900m", False, "fault", "cannot be written: Read-only file system"),
        ("size=80m,nr_inodes=1", False, "fault", "cannot be written: No space left on device"),
        ("size=70m", False, "ok", "0.1 GiB free, writes "),
        ("size=900m", True, "fault", "a checkpoint takes 1.00 GiB, at most 3 of them 3.0 GiB"),
        ("size=2g", True, "warning", "a checkpoint takes 1.00 GiB, at most 3 of them 3.0 GiB"),
        ("size=4g", True, "ok", "a checkpoint takes 1.00 GiB, at most 3 of them 3.0 GiB"),
    ],
)
def test_a_disk_with_a_fault(options: str, with_recipe: bool, status: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    found = find_in_child(tmp_path, on_disk, tmp_path / "disk", options, with_recipe)
    assert (found.status, said in found.saw) == (status, True), found
    assert "run.folder" in found.advice or status == "ok"


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    found = run_check(Check("runs", lambda: check_disk("run.folder", tmp_path / "runs" / "x")))
    assert "runs is no folder" in found.saw


def test_a_slow_disk_makes_checkpoints_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "measure_write_speed", lambda place: 10.0)
    found = check_disk("run.folder", tmp_path, lambda: needs(1))
    assert (found.status, "a checkpoint would take 102 s to write" in found.saw) == ("warning", True)
    assert check_disk("run.folder", tmp_path).saw.endswith(": slow")
