"""The geometry of the charts."""

import re

import numpy as np
import pytest

from smoltrain.config.schema import PhaseSection
from smoltrain.report.charts import Charts, open_charts
from smoltrain.run.run_metrics import RunMetrics
from smoltrain.run.step_axis import StepAxis
from smoltrain.schedule import Plan


def charts_of(values: dict[str, list[float]]) -> Charts:
    metrics = RunMetrics()
    num_steps = max(map(len, values.values()))
    for step in range(1, num_steps + 1):
        metrics.add(
            {"step": step, **{name: column[step - 1] for name, column in values.items() if step <= len(column)}}
        )
    plan = Plan((PhaseSection(name="main", steps=num_steps, lr=1e-3),))
    return open_charts(metrics, StepAxis(plan, 1, num_steps))


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.-]+) ([\d.-]+)", path)]


@pytest.mark.parametrize("is_log", [False, True])
def test_a_line_goes_through_its_values(is_log: bool):
    charts = charts_of({"x": [1.0, 10.0, 100.0]})
    chart = charts.draw_lines("x", charts.series("x"), is_log=is_log)
    assert chart
    (line,) = [path for path in chart.paths if path.kind == "line a"]
    (left, low), (centre, between), (right, high) = points(line.path)
    assert (left, centre, right) == pytest.approx((1000 / 6, 500, 5000 / 6), abs=0.1)
    assert 0 < high < between < low < 1000
    assert between == pytest.approx(low + (high - low) * (0.5 if is_log else 9 / 99), abs=0.2)
    assert chart.last == "100"


def test_what_is_not_finite_is_marked_and_what_a_logarithm_cannot_have_is_said():
    charts = charts_of({"x": [np.nan, 2.0, np.inf, 0.0, 4.0], "all": [np.nan] * 5})
    chart = charts.draw_lines("x", charts.series("x"), is_log=True)
    assert chart
    assert chart.notes == [
        "2 values are not finite (squares at the top)",
        "1 values are not above 0 and are left out of the logarithmic scale",
    ]
    assert [path.path.count("M") for path in chart.paths if path.kind == "missing"] == [2]
    nothing = charts.draw_lines("all", charts.series("all"), is_log=True)
    assert nothing
    assert ([path.kind for path in nothing.paths], nothing.y_ticks) == (["missing"], [])
    assert charts.draw_lines("never logged", charts.series("y")) is None


def test_an_extreme_of_many_steps_is_drawn():
    values = [1.0] * 20_000
    values[12_345] = 3.0
    charts = charts_of({"x": values})
    chart = charts.draw_lines("x", charts.series("x", is_noisy=True))
    assert chart
    faint, smooth = chart.paths
    tops = {y: x for x, y in points(faint.path)}
    assert tops[min(tops)] == pytest.approx(1000 * 12_345.5 / 20_000, abs=0.1)
    assert len(points(faint.path)) < 1000
    assert len({y for _, y in points(smooth.path)}) == 1


def cells(path: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, cell)) for cell in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)", path)]


def test_a_heat_map_has_a_row_for_each_name_and_a_colour_for_each_power():
    charts = charts_of({"g/a": [1.0, 10.0, 100.0], "g/b": [100.0, 100.0, np.nan]})
    chart = charts.draw_heat_map("g", "g/", num_levels=2)
    assert chart
    assert (chart.rows, chart.low, chart.high) == (["a", "b"], "1", "100")
    levels = {level.kind: cells(level.path) for level in chart.levels}
    assert levels["heat0"] == [(0, 0, 333.3, 500)]
    assert levels["heat1"] == [
        (333.3, 0, 666.7, 500),
        (666.7, 0, 1000, 500),
        (0, 500, 333.3, 1000),
        (333.3, 500, 666.7, 1000),
    ]
    assert levels["heatbad"] == [(666.7, 500, 1000, 1000)]
    assert chart.notes == ["1 values are not finite"]


def test_a_heat_map_of_many_steps_keeps_the_largest():
    values = [1.0] * 5000
    values[2345] = 1000.0
    chart = charts_of({"g/a": values}).draw_heat_map("g", "g/")
    assert chart
    levels = {level.kind: cells(level.path) for level in chart.levels}
    ((left, _, right, _),) = levels["heat9"]
    assert left < 1000 * 2345.5 / 5000 < right
    assert len(levels["heat0"]) == 159
