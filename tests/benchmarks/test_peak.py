"""The matmul peak."""

import pytest

from benchmarks import peak, timing


def test_the_matmul_peak_counts_a_multiplication_and_an_addition_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        peak, "time_interleaved", lambda work, rounds: {"matmul": timing.CallTimes(0.5, "3 of 3", rounds)}
    )
    assert peak.measure_matmul_flops("fp32", size=10) == 2 * 10**3 / 0.5
    monkeypatch.undo()
    assert 1e6 < peak.measure_matmul_flops("bf16", size=128, rounds=3) < 1e16
