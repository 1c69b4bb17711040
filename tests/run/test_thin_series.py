"""What is drawn of very many values."""

import numpy as np

from smoltrain.run.thin_series import running_median, smooth_series, thin_series


def test_no_extreme_of_100_000_values_is_lost():
    values = np.random.default_rng(0).normal(size=100_000)
    places = np.linspace(0, 1, len(values))
    values[33_333], values[77_777], values[500] = 50, -50, np.nan
    thin_places, thin = thin_series(places, values)
    assert len(thin) <= 2 * 400 + 2
    assert (thin.max(), thin.min()) == (50, -50)
    assert thin_places[thin.argmax()] == places[33_333]
    assert (np.diff(thin_places) > 0).all()
    assert (thin_places[0], thin_places[-1]) == (0, 1)
    few = np.array([3.0, np.inf, 1.0])
    assert thin_series(places[:3], few)[1].tolist() == [3.0, 1.0]


def test_a_running_median_ignores_a_spike():
    values = np.array([1.0, 1.0, 9.0, 1.0, 2.0])
    assert running_median(values, 3).tolist() == [1.0, 1.0, 1.0, 2.0, 1.5]
    assert running_median(values, 1).tolist() == values.tolist()
    assert running_median(values, 3, np.array([2, 4])).tolist() == [1.0, 1.5]


def test_a_smooth_line_has_few_points_over_the_whole_axis():
    places = np.linspace(0, 1, 10_000)
    values = np.where(np.arange(10_000) == 5000, 1e9, places)
    smooth_places, smooth = smooth_series(places, values)
    assert len(smooth) <= 301
    assert (smooth_places[0], smooth_places[-1]) == (0, 1)
    assert np.abs(smooth - smooth_places).max() < 0.01
    assert len(smooth_series(places[:5], np.full(5, np.nan))[1]) == 0
