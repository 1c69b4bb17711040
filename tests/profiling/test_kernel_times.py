"""Kernels by name, and when a device had nothing to do."""

import pytest

from smoltrain.profiling.kernel_times import KernelRun, find_timeline, sum_by_kernel


def test_what_overlaps_is_busy_once_and_short_pauses_are_no_gaps() -> None:
    runs = [KernelRun("a", 0.0, 1.0), KernelRun("b", 0.5, 2.0), KernelRun("a", 2.000005, 3.0), KernelRun("c", 4.0, 4.5)]
    timeline = find_timeline(runs)
    assert timeline.span_s == 4.5
    assert timeline.busy_s == pytest.approx(3.499995)
    assert timeline.gaps_s == [pytest.approx(1.0)]
    assert [(name, count) for name, count, _ in sum_by_kernel(runs)] == [("a", 2), ("b", 1), ("c", 1)]
