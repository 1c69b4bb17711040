"""What became of a run: it trains, waits for its first step, is done, was stopped, or failed.

Whether somebody trains it is asked of its lock (run/run_lock.py), which ends with its processes however they end: a run
whose processes were killed does not count as running because its last line is young. How it ended it has written down
itself (run/run_ending.py); without that it was killed.
"""

import datetime
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smoltrain.checkpoint.manifest import read_last_saved_step
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.yaml_text import read_yaml
from smoltrain.errors import UserError
from smoltrain.run.run_ending import read_ending
from smoltrain.run.run_lock import is_run_locked, lock_file
from smoltrain.run.time_left import CLOSING_S

State = Literal["running", "waiting", "done", "stopped", "failed"]
STATES: tuple[State, ...] = ("running", "waiting", "failed", "stopped", "done")  # as they are listed
SILENCE_S = 600.0  # without locks: a run that was silent for longer is taken for one that has ended
NO_LOCKS = "its file system has no locks, so that this is judged by its last line"
KILLED = "killed, or its machine went down: its processes left without a word"


class RunPlan(NamedTuple):
    """What config.yaml says of a run, for whoever needs no more of it."""

    last_step: int | None  # None where that cannot be read
    started_at: float  # when its newest start began to train, seconds since 1970; 0 where that is not said
    damage: str | None  # what is wrong with the file


class RunState(NamedTuple):
    """What became of a run."""

    state: State
    note: str  # more of it, in a few words; "" where there is nothing to say


def read_run_plan(folder: Path) -> RunPlan | None:
    """The plan of a run; None for one that has not begun to train. A file that has not changed is read once."""
    path = folder / CONFIG_FILE
    try:
        status = path.stat()
    except OSError:
        return None
    return _read_plan_once(path, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=256)
def _read_plan_once(path: Path, _time_ns: int, _inode: int) -> RunPlan:
    try:
        tree = read_yaml(path, typed=True)
    except UserError as error:
        return RunPlan(None, 0.0, str(error.problems[0]))
    try:
        last_step = sum(int(phase["steps"]) for phase in tree["phases"])
    except (KeyError, TypeError, ValueError):
        return RunPlan(None, 0.0, f"{path} does not say how long its phases are")
    try:
        newest_start = tree["provenance"]["starts"][-1]["time"]
        started_at = datetime.datetime.fromisoformat(newest_start).timestamp()
    except (LookupError, TypeError, ValueError):
        started_at = 0.0
    return RunPlan(last_step, started_at, None)


def find_run_state(folder: Path, plan: RunPlan | None, newest: Mapping[str, Any], now_s: float) -> RunState:
    """What became of a run. `newest` is the last line of its metrics.jsonl, {} if there is none."""
    lock = lock_file(folder.parent, folder.name)
    newest_at = float(newest.get("time_s", 0.0))
    is_locked = is_run_locked(lock)
    if is_locked or (is_locked is None and now_s - newest_at < SILENCE_S):
        note = "" if is_locked else NO_LOCKS
        locked_at = lock.stat().st_mtime if is_locked else 0.0
        if newest_at and newest_at >= locked_at:
            return RunState("running", note)
        return RunState("waiting", "its processes are starting, or prepare its data")
    if plan is None:
        return RunState("waiting", "its data are prepared, and nobody has started it")
    ended = _find_ending(folder, plan, newest)
    return ended if is_locked is not None else RunState(ended.state, "; ".join(filter(None, (ended.note, NO_LOCKS))))


def _find_ending(folder: Path, plan: RunPlan, newest: Mapping[str, Any]) -> RunState:
    """How a run ended that nobody trains."""
    if plan.damage:
        return RunState("failed", plan.damage)
    if plan.last_step is not None and read_last_saved_step(folder) >= plan.last_step:
        return RunState("done", "")
    ending = read_ending(folder)
    if ending is not None:
        return RunState("failed" if ending.kind == "failed" else "stopped", ending.reason)
    if CLOSING_S in newest and float(newest.get("time_s", 0.0)) >= plan.started_at:  # older versions say no more
        return RunState("stopped", "")
    return RunState("failed", KILLED)
