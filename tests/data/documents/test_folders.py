"""Folders with links in circles, and with what can not be read."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from smoltrain.data.documents.find_files import find_source_files
from smoltrain.data.documents.folders import BROKEN_LINKS, SPECIAL_FILES, UNREADABLE_FOLDERS
from tests.data.documents.files import at, names
from tests.data.documents.files import problem as listing_problem


def test_links_among_many_folders_are_no_maze(tmp_path: Path):
    for i in range(10):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.txt").write_text("a")
        for j in range(10):
            (tmp_path / f"{i}" / f"to{j}").symlink_to(f"../{j}")
    assert names(tmp_path) == [f"{i}/a.txt" for i in range(10)]


def test_what_can_not_be_read_is_passed_over_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "b.txt").write_text("b")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jsonl"))
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "round.txt").symlink_to("round.txt")
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(tmp_path) == ["a.txt"]
    assert find_source_files(at(tmp_path)).unread == {UNREADABLE_FOLDERS: 1, BROKEN_LINKS: 2, SPECIAL_FILES: 2}
    assert "which is no regular file" in listing_problem(at(tmp_path / "pipe.txt"))
    (tmp_path / "a.txt").unlink()
    assert "but 2 broken links, 2 pipes, sockets and devices, want" in listing_problem(at(tmp_path, pattern="*"))
