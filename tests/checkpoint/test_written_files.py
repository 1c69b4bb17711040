"""Files that a rank says it has written, looked at by another."""

from pathlib import Path

import pytest

from smoltrain.checkpoint import written_files
from smoltrain.checkpoint.manifest import FileRecord


def test_the_first_file_that_is_not_as_it_was_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_files, "PATIENCE_S", 0.0)
    records: dict[str, FileRecord] = {name: {"bytes": 3, "sha256": ""} for name in ("a.pt", "b.pt")}
    (tmp_path / "a.pt").write_bytes(b"abc")
    assert written_files.find_unseen_file(tmp_path, records) == "b.pt is not there"
    (tmp_path / "b.pt").write_bytes(b"ab")
    assert written_files.find_unseen_file(tmp_path, records) == "b.pt has 2 bytes, not 3"
    (tmp_path / "b.pt").write_bytes(b"abc")
    assert written_files.find_unseen_file(tmp_path, records) is None


def test_a_file_may_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_files.time, "sleep", lambda _: (tmp_path / "a.pt").write_bytes(b"abc"))
    assert written_files.find_unseen_file(tmp_path, {"a.pt": {"bytes": 3, "sha256": ""}}) is None
