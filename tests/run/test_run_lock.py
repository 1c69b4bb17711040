"""A run is locked as long as anybody lives who holds its lock."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import UserError
from smoltrain.run.run_lock import is_run_locked, lock_file, lock_run_folder
from tests import tiny


def test_a_second_process_is_refused_until_the_first_has_closed_the_lock(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path)
    lock = lock_run_folder(settings)
    assert lock is not None
    with pytest.raises(UserError, match=r"or prepares its data: saw \S+/\.quickstart\.lock, want one at a time"):
        lock_run_folder(settings, patience_s=0.1)
    other = lock_run_folder(tiny.load(tmp_path, "run.name=other"))
    assert other is not None, "runs of one folder do not lock each other out"
    os.close(other)
    os.close(lock)
    again = lock_run_folder(settings, patience_s=0.0)
    assert again is not None
    os.close(again)


def test_who_inherits_the_lock_holds_it_too(tmp_path: Path) -> None:
    """Rank 0 does; a process that it starts in its turn does not."""
    settings = tiny.load(tmp_path)
    lock = lock_run_folder(settings)
    assert lock is not None
    command = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    heir = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lock,))
    stranger = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for process in (heir, stranger):
        assert process.stdout is not None
        process.stdout.readline()
    os.close(lock)
    with pytest.raises(UserError, match="another process trains this run"):
        lock_run_folder(settings, patience_s=0.1)
    heir.communicate()
    again = lock_run_folder(settings, patience_s=1.0)
    assert again is not None
    os.close(again)
    stranger.communicate()


def test_others_may_ask_who_trains_without_leaving_a_trace(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path)
    path = lock_file(settings.run.folder, settings.run.name)
    assert is_run_locked(path) is False
    assert not path.exists()
    lock = lock_run_folder(settings)
    assert lock is not None
    os.utime(path, (1.0, 1.0))
    assert is_run_locked(path) is True
    assert path.stat().st_mtime == 1.0
    os.close(lock)
    assert is_run_locked(path) is False
    again = lock_run_folder(settings, patience_s=0.0)
    assert again is not None, "whoever asked holds nothing"
    assert path.stat().st_mtime > 1.0, "it tells when the run was last locked"
    os.close(again)


def test_a_lock_that_nobody_may_ask_for_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    assert is_run_locked(tmp_path / ".x.lock") is None


def test_a_file_system_without_locks_locks_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert lock_run_folder(tiny.load(tmp_path)) is None


@pytest.mark.parametrize(
    ("code", "want"), [(errno.EROFS, "a file system that is not read-only"), (errno.EACCES, "a folder")]
)
def test_a_folder_that_cannot_be_written_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, want: str
) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError, match=f"the run cannot be written there: .* want {want}"):
        lock_run_folder(tiny.load(tmp_path))
