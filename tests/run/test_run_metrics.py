"""The columns of a metrics.jsonl."""

import math
from pathlib import Path

import pytest

from smoltrain.errors import UserError
from smoltrain.files import format_json_line
from smoltrain.run.run_metrics import read_run_metrics


def test_lines_become_columns(tmp_path: Path):
    lines = [
        {"step": 3, "a/x": 1, "a/text": "one", "a/none": None, "a/flag": True},
        {"step": 4, "a/x": math.nan, "b/y": 2.5, "a/text": "two"},
        {"step": 4, "b/y": 3.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(map(format_json_line, lines)) + '{"step": 5, "a/x"')
    metrics = read_run_metrics(tmp_path)
    assert (metrics.first_step, metrics.last_step) == (3, 4)
    steps, values = metrics.series("a/x")
    assert (steps.tolist(), values.tolist()) == ([3, 4], [1.0, pytest.approx(math.nan, nan_ok=True)])
    assert metrics.series("b/y")[0].tolist() == [4, 4]
    assert (metrics.last("b/y"), metrics.last("c"), metrics.last_texts["a/text"]) == (3.5, None, "two")
    assert (metrics.names(), metrics.names("b/")) == (["a/x", "b/y"], ["b/y"])
    assert len(metrics.series("nothing")[0]) == 0


def test_a_run_without_a_line_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="nothing to draw yet"):
        read_run_metrics(tmp_path)
