"""Losses over steps, tokens and hours."""

from pathlib import Path

import numpy as np
import pytest

from smoltrain.config.load import read_run_config
from smoltrain.monitor.curves import average_neighbours, read_run_curves
from smoltrain.run.summary import summarise_run
from smoltrain.schedule import Plan
from tests.monitor.records import START_S, STEP_S, TOKENS, make_run, step_line, validation_line, write_lines


def test_a_curve_has_three_axes(tmp_path: Path) -> None:
    curves = read_run_curves(make_run(tmp_path))
    assert curves.training.steps.tolist() == list(range(1, 9))
    assert curves.training.tokens.tolist() == [TOKENS * step for step in range(1, 9)]
    assert curves.training.hours * 3600 == pytest.approx([START_S + STEP_S * step for step in range(1, 9)])
    assert curves.validation.axis("tokens").tolist() == [TOKENS * 4, TOKENS * 8]
    assert curves.validation.loss_at(8) == 5.5
    assert curves.validation.loss_at(7) is None


def test_nobodys_night_between_two_starts_is_an_hour(tmp_path: Path) -> None:
    night_s = 40_000.0
    second = [step_line(step) for step in (3, 4)]
    second[0]["speed/start_s"] = 20.0
    for line in second:
        line["time_s"] += night_s
    curves = read_run_curves(make_run(tmp_path, lines=[step_line(1), step_line(2), *second]))
    first_s = START_S + 2 * STEP_S
    assert curves.training.hours[2] * 3600 == pytest.approx(first_s + 20.0 + STEP_S)
    assert curves.training.hours[3] * 3600 == pytest.approx(first_s + 20.0 + 2 * STEP_S)


def test_steps_that_were_done_again_took_time_too(tmp_path: Path) -> None:
    """Killed behind a checkpoint, as within one start after a rewind: as the summary's time of all starts counts it."""
    night_s = 40_000.0
    killed = [step_line(step) for step in (1, 2, 3, 4)]
    again = [step_line(step) for step in (3, 4)]
    again[0]["speed/start_s"] = 20.0
    for line in again:
        line["time_s"] += night_s
    run = make_run(tmp_path, lines=[*killed[:2], *again])
    write_lines(run / "metrics.undone.jsonl", killed[2:])
    hours = read_run_curves(run).training.hours
    first_s = START_S + 4 * STEP_S
    assert hours * 3600 == pytest.approx(
        [START_S + STEP_S, START_S + 2 * STEP_S, first_s + 20.0 + STEP_S, first_s + 20.0 + 2 * STEP_S]
    )
    times = summarise_run(Plan(read_run_config(run / "config.yaml").phases), run).times
    assert times
    assert hours[-1] * 3600 == pytest.approx(times.wall_s)


def test_what_older_versions_did_not_write_is_no_number(tmp_path: Path) -> None:
    older = {name: value for name, value in step_line(1).items() if name not in ("time_s", "data/tokens")}
    curves = read_run_curves(make_run(tmp_path, lines=[older, validation_line(1, 5.0) | {"time_s": 1.0}]))
    assert np.isnan(curves.training.tokens).all()
    assert np.isnan(curves.training.hours).all()


def test_a_long_curve_is_averaged() -> None:
    x = np.arange(1000)
    y = x + np.where(x % 2, 1.0, -1.0)
    few_x, few_y = average_neighbours(x, y, most=100)
    assert len(few_x) == 100
    assert few_x == pytest.approx(x.reshape(100, 10).mean(1))
    assert few_y == pytest.approx(few_x), "the noise is gone"
    y[3] = np.nan
    assert average_neighbours(x, y, most=1000)[0].tolist() == [n for n in x if n != 3]
    assert [len(part) for part in average_neighbours(np.array([]), np.array([]))] == [0, 0]
