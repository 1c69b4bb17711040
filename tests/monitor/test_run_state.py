"""What became of a run: true whatever its last line says."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smoltrain.checkpoint.manifest import write_last_saved_step
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.monitor.run_state import KILLED, NO_LOCKS, RunState, find_run_state, read_run_plan
from smoltrain.run.run_ending import write_ending
from smoltrain.run.run_lock import lock_file, lock_run_folder
from tests import tiny
from tests.monitor.records import make_run

NOW_S = 5_000_000_000.0  # later than anything that these tests write
YOUNG_LINE = {"step": 8, "time_s": NOW_S}


def state_of(run: Path, newest: dict[str, Any] = YOUNG_LINE, now_s: float = NOW_S) -> RunState:
    return find_run_state(run, read_run_plan(run), newest, now_s)


def save(run: Path, step: int) -> None:
    write_last_saved_step(run / "checkpoints", step)


ENDINGS: list[tuple[str, Callable[[Path], Any], dict[str, Any], tuple[str, str]]] = [
    ("nothing was said", lambda run: None, {}, ("failed", KILLED)),
    ("killed after a save", lambda run: save(run, 8), {}, ("failed", KILLED)),
    ("its last checkpoint is there", lambda run: save(run, 12), {}, ("done", "")),
    ("a signal", lambda run: write_ending(run, "stopped", "after step 8"), {}, ("stopped", "after step 8")),
    ("a phase", lambda run: write_ending(run, "done", "main is complete"), {}, ("stopped", "main is complete")),
    ("an error", lambda run: write_ending(run, "failed", "OSError: no\nspace"), {}, ("failed", "OSError: no space")),
    ("an older version", lambda run: None, {"speed/closing_s": 1.0}, ("stopped", "")),
    ("a start since then", lambda run: None, {"speed/closing_s": 1.0, "time_s": 9.0}, ("failed", KILLED)),
]  # fmt: skip


@pytest.mark.parametrize(("what", "prepare", "newest", "wanted"), ENDINGS, ids=[case[0] for case in ENDINGS])
def test_how_a_run_ended_that_nobody_trains(
    tmp_path: Path, what: str, prepare: Callable[[Path], Any], newest: dict[str, Any], wanted: tuple[str, str]
) -> None:
    run = make_run(tmp_path)
    prepare(run)
    assert state_of(run, {"step": 8, "time_s": NOW_S, **newest}) == wanted


def test_whoever_holds_the_lock_trains_it_from_its_first_line_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_ending(run, "failed", "of the start before")
    lock = lock_run_folder(tiny.load(tmp_path))
    assert lock is not None
    locked_at = lock_file(run.parent, run.name).stat().st_mtime
    assert state_of(run, {"step": 8, "time_s": locked_at - 1.0}).state == "waiting", "a line of the start before"
    assert state_of(run, {"step": 8, "time_s": locked_at + 1.0}) == ("running", "")
    os.close(lock)
    assert state_of(run) == ("failed", "of the start before"), "however young its last line is"


def test_a_run_that_has_not_begun_waits(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart"
    (run / "data").mkdir(parents=True)
    assert state_of(run, {}) == ("waiting", "its data are prepared, and nobody has started it")
    lock = lock_run_folder(tiny.load(tmp_path))
    assert lock is not None
    assert state_of(run, {}) == ("waiting", "its processes are starting, or prepare its data")
    os.close(lock)


def test_without_locks_the_last_line_decides_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    run = make_run(tmp_path)
    lock_file(run.parent, run.name).touch()
    monkeypatch.setattr(fcntl, "flock", unknown)
    assert state_of(run, {"step": 8, "time_s": NOW_S - 60.0}) == ("running", NO_LOCKS)
    assert state_of(run, {"step": 8, "time_s": NOW_S - 6000.0}) == ("failed", f"{KILLED}; {NO_LOCKS}")


def test_a_config_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert read_run_plan(run) is not None
    (run / CONFIG_FILE).write_text("phases: [", encoding="utf-8")
    found = state_of(run)
    assert found.state == "failed"
    assert "the file cannot be read as YAML" in found.note
    (run / CONFIG_FILE).write_text("phases: 3\n", encoding="utf-8")
    assert "does not say how long its phases are" in state_of(run).note
    assert read_run_plan(tmp_path) is None
