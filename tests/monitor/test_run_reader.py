"""What the live view knows of a run, look after look."""

from pathlib import Path

from smoltrain.monitor import run_reader
from smoltrain.monitor.chart import Point
from smoltrain.monitor.run_reader import RunReader, thin_points
from smoltrain.run.run_lock import hold_run_lock
from tests import tiny
from tests.monitor.records import BEGAN_AT, START_S, STEP_S, make_run, step_line, validation_line, write_lines

LOG = """\
2026-11-30 12:00:00,000 smoltrain INFO WARNING: the model memorises its training rows
2026-11-30 12:00:00,000 DeepSpeed WARNING something of its own
2026-11-30 12:00:01,000 smoltrain INFO step 1/12 main
"""


def test_a_reader_follows_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, lines=[step_line(1)])
    reader = RunReader(run)
    reader.refresh()
    assert (reader.step, reader.last_step, reader.phase, reader.losses) == (1, 12, "main", [Point(1, 5.9)])
    write_lines(run / "metrics.jsonl", [step_line(2), validation_line(2, 5.5)], mode="a")
    (run / "logs" / "rank0.log").write_text(LOG, encoding="utf-8")
    write_lines(
        run / "samples.jsonl", [{"step": 1, "prompt": "a", "text": "b"}, {"step": 2, "prompt": "c", "text": "d"}]
    )
    write_lines(run / "spikes.jsonl", [{"step": 2, "does": "skip", "rows": [0, 4]}])
    reader.refresh()
    assert reader.losses == [Point(1, 5.9), Point(2, 5.8)]
    assert reader.validations == [Point(2, 5.5)]
    assert reader.numbers["validation/best_loss_nats_per_token"] == 5.5
    assert reader.warnings == ["WARNING: the model memorises its training rows"]
    assert reader.sample == {"step": 2, "prompt": "c", "text": "d"}
    assert (reader.num_spikes, reader.state.state) == (1, "failed")
    write_lines(run / "metrics.jsonl", [step_line(1)])  # a start that went on from an earlier checkpoint
    reader.refresh()
    assert (reader.losses, reader.validations, reader.step) == ([Point(1, 5.9)], [], 1)


def test_time_left_is_told_of_a_run_that_runs_and_falls_with_the_clock(tmp_path: Path) -> None:
    now_s = 4_000_000_000.0
    with hold_run_lock(tiny.load(tmp_path)):
        run = make_run(tmp_path, "evaluate.every=100", "sample.every=100", "checkpoint.every=100")
        write_lines(run / "metrics.jsonl", [step_line(step) | {"time_s": now_s} for step in (2, 3)])
        reader = RunReader(run)
        reader.refresh(now_s)
        assert reader.estimate_left_s(now_s) == (12 - 3) * STEP_S
        assert reader.estimate_left_s(now_s + 5.0) == (12 - 3) * STEP_S - 5.0
        assert reader.estimate_left_s(now_s + 500.0) == 0.0
    reader.refresh(now_s)
    assert reader.estimate_left_s(now_s) is None
    assert now_s > BEGAN_AT + START_S


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    reader = RunReader(tmp_path / "runs" / "quickstart")
    reader.refresh()
    assert (reader.state.state, reader.step, reader.last_step, reader.losses) == ("waiting", 0, None, [])
    make_run(tmp_path)
    reader.refresh()
    assert (reader.step, reader.last_step) == (8, 12)


def test_curves_stay_small(monkeypatch) -> None:  # pyright: ignore[reportMissingParameterType]
    monkeypatch.setattr(run_reader, "MAX_POINTS", 10)
    assert [point.step for point in thin_points([Point(step, 1.0) for step in range(35)])] == list(range(0, 35, 4))
