"""The picture of a comparison."""

import struct
from pathlib import Path

import numpy as np
import pytest

from smoltrain.errors import UserError
from smoltrain.monitor.compare import RunComparison, compare_named_runs
from smoltrain.monitor.comparison_plot import draw_comparison, render_png, write_picture
from tests.monitor.records import make_run, step_line


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> RunComparison:
    folder = tmp_path_factory.mktemp("drawn")
    names = ("_one", "two $x^2$ <script>")
    runs = [make_run(folder, "run.name=one"), make_run(folder, "run.name=two", lines=[step_line(1), step_line(2)])]
    renamed = [run.rename(run.with_name(name)) for run, name in zip(runs, names, strict=True)]
    return compare_named_runs([str(run) for run in renamed])


def test_every_loss_of_every_run_is_drawn_over_three_axes(comparison: RunComparison) -> None:
    figure = draw_comparison(comparison.runs)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "step",
        "tokens trained on, all ranks",
        "hours of all starts",
    ]
    for axes, name in zip(figure.axes, ("steps", "tokens", "hours"), strict=True):
        lines = axes.get_lines()
        assert len(lines) == 4
        for run, training, validation in zip(comparison.runs, lines[::2], lines[1::2], strict=True):
            assert np.asarray(training.get_ydata()).tolist() == run.curves.training.losses.tolist()
            assert np.asarray(training.get_xdata()).tolist() == run.curves.training.axis(name).tolist()
            assert np.asarray(validation.get_ydata()).tolist() == run.curves.validation.losses.tolist()
            assert training.get_color() == validation.get_color()
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_one", "two $x^2$ <script>"]
    assert not any(text.get_parse_math() for text in legend.get_texts()), "a name is no formula"


def test_the_picture_is_a_png(comparison: RunComparison, tmp_path: Path) -> None:
    content = render_png(comparison.runs)
    assert struct.unpack(">II", content[16:24]) == (1170, 1469)
    write_picture(tmp_path / "a.png", content, "--png")
    assert (tmp_path / "a.png").read_bytes() == content
    with pytest.raises(UserError, match=r"the comparison cannot be written: .* change --png"):
        write_picture(tmp_path / "none" / "a.png", content, "--png")
