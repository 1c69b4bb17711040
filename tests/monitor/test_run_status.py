"""The status of each run, out of its own records."""

import json
from pathlib import Path

import pytest

from smoltrain.errors import UserError
from smoltrain.monitor import run_status
from smoltrain.monitor.run_status import list_run_folders, read_all_statuses, read_run_status
from smoltrain.run.run_ending import write_ending
from smoltrain.run.run_lock import hold_run_lock
from tests import tiny
from tests.monitor.records import BEGAN_AT, TOKENS, make_run, step_line, validation_line


def test_a_status_tells_the_last_of_each(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_ending(run, "stopped", "after step 8 (SIGTERM)")
    status = read_run_status(run)
    assert (status.name, status.state, status.note) == ("quickstart", "stopped", "after step 8 (SIGTERM)")
    assert (status.step, status.last_step, status.loss) == (8, 12, 6.0 - 0.8)
    assert (status.validation_step, status.validation_loss) == (8, 5.5)
    assert status.tokens_per_s == TOKENS / 2
    assert status.last_sign_at == BEGAN_AT + 10 + 16


def test_throughput_is_that_of_the_last_steps_together(tmp_path: Path) -> None:
    slow = step_line(2, **{"speed/step_s": 6.0, "speed/tokens_per_s": TOKENS / 6.0})
    assert read_run_status(make_run(tmp_path, lines=[step_line(1), slow])).tokens_per_s == 2 * TOKENS / 8.0


def test_only_the_end_of_long_records_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_status, "TAIL_BYTES", 1000)
    lines = [step_line(1), validation_line(1, 5.9), *(step_line(step) for step in range(2, 100))]
    status = read_run_status(make_run(tmp_path, lines=lines))
    assert (status.step, status.validation_loss) == (99, 5.9), "the validation lies farther back, and is looked for"


def test_runs_are_listed_by_state_and_by_their_last_sign(tmp_path: Path) -> None:
    for name, ending in (("old", "stopped"), ("broken", "failed"), ("young", "stopped")):
        later = 100.0 if name == "young" else 0.0
        line = step_line(1)
        run = make_run(tmp_path, f"run.name={name}", lines=[line | {"time_s": line["time_s"] + later}])
        write_ending(run, ending, "")  # pyright: ignore[reportArgumentType]
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "runs" / ".gone.lock").touch()
    with hold_run_lock(tiny.load(tmp_path, "run.name=starting")):
        listed = [(status.name, status.state) for status in read_all_statuses(tmp_path / "runs")]
    assert listed == [("starting", "waiting"), ("broken", "failed"), ("young", "stopped"), ("old", "stopped")]
    assert list_run_folders(tmp_path / "nowhere") == []
    with pytest.raises(UserError, match="the runs cannot be listed"):
        list_run_folders(tmp_path / "runs" / ".gone.lock")


def test_numbers_that_are_none_are_text_in_json(tmp_path: Path) -> None:
    status = read_run_status(make_run(tmp_path, lines=[step_line(1, loss=float("nan"))]))
    told = json.loads(json.dumps(status.to_json(), allow_nan=False))
    assert (told["loss"], told["validation_loss"], told["last_step"]) == ("nan", None, 12)


def test_records_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    status = read_run_status(run)
    assert "metrics.jsonl cannot be read (no regular file" in status.note
    assert status.loss is None
