"""The picture of an estimate of several worlds: what is drawn, and where it ends up."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from smoltrain.run.scaling_plot import draw_scaling
from tests.estimate.test_scaling import GROWING, scale


def test_curves_are_those_of_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: drawn.append(figure))
    scaling = scale(*GROWING, worlds="8..64", between="25gbit")
    draw_scaling(scaling, tmp_path / "new" / "scaling.png")
    upper, lower = drawn[0].axes
    curves = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in upper.get_lines()}
    points = scaling.points
    assert curves["estimated"] == [point.speed.tokens_per_s for point in points]
    assert curves["after failures and checkpoints"] == [point.kept_tokens_per_s for point in points]
    assert curves["in proportion"] == pytest.approx([points[0].speed.tokens_per_s * n for n in (1, 2, 4, 8)])
    assert "more than 8 ranks do not pay" in curves
    assert np.asarray(lower.get_lines()[1].get_ydata()).tolist() == [100 * point.efficiency for point in points]
