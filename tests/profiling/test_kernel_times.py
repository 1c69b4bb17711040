"""Kernels by name."""

from smoltrain.profiling.kernel_times import KernelRun, sum_by_kernel


def test_launches_and_seconds_are_added_up_by_name() -> None:
    runs = [KernelRun("a", 0.0, 1.0), KernelRun("b", 0.5, 2.0), KernelRun("a", 2.0, 3.0), KernelRun("c", 4.0, 4.5)]
    assert sum_by_kernel(runs) == [("a", 2, 2.0), ("b", 1, 1.5), ("c", 1, 0.5)]
