"""What is drawn of very many values: the extremes of each stretch of an axis, and a running median.

Places are where values stand on the axis, ascending.
"""

import itertools

import numpy as np

NUM_MEDIANS = 300


def thin_series(places: np.ndarray, values: np.ndarray, num_bins: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest finite value in each of so many stretches of the axis: no extreme is lost."""
    is_finite = np.isfinite(values)
    places = places[is_finite]
    values = values[is_finite]
    if len(values) <= 2 * num_bins:
        return places, values
    kept: set[int] = {0, len(values) - 1}
    for begin, end in _cut_into_bins(places, num_bins):
        kept.update((begin + int(values[begin:end].argmin()), begin + int(values[begin:end].argmax())))
    order = np.array(sorted(kept))
    return places[order], values[order]


def smooth_series(places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running medians of finite values, each over a 50th of them; at most NUM_MEDIANS, spread over the axis."""
    is_finite = np.isfinite(values)
    places = places[is_finite]
    values = values[is_finite]
    if not len(values):
        return places, values
    starts = [begin for begin, _ in _cut_into_bins(places, NUM_MEDIANS)]
    centres = np.array(sorted({*starts, len(values) - 1}))
    return places[centres], running_median(values, len(values) // 50, centres)


def running_median(values: np.ndarray, width: int, centres: np.ndarray | None = None) -> np.ndarray:
    """The median of values and their neighbours, `width` of them in all (fewer at the ends); of all, or of these."""
    half = width // 2
    chosen = range(len(values)) if centres is None else centres
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in chosen])


def _cut_into_bins(places: np.ndarray, num_bins: int) -> list[tuple[int, int]]:
    """(first, end) of the values in each of so many stretches of equal width, those without one left out."""
    borders = np.linspace(places[0], places[-1], num_bins + 1)
    edges = np.searchsorted(places, borders)
    edges[-1] = len(places)
    return [(int(begin), int(end)) for begin, end in itertools.pairwise(edges) if end > begin]
