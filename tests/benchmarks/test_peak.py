"""The peaks of a machine."""

from pathlib import Path

import pytest

from benchmarks import peak, timing


def test_the_matmul_peak_counts_a_multiplication_and_an_addition_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        peak, "time_interleaved", lambda work, rounds: {"matmul": timing.CallTimes(0.5, "3 of 3", rounds)}
    )
    assert peak.measure_matmul_flops("fp32", size=10) == 2 * 10**3 / 0.5
    monkeypatch.undo()
    assert 1e6 < peak.measure_matmul_flops("bf16", size=128, rounds=3) < 1e16


def test_a_gpu_is_warm_first_and_waited_for_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now_s = [0.0]

    def call() -> None:
        said.append("call")
        now_s[0] += 0.25 if said.count("call") < 3 else 0.01  # a GPU that is slow until it is warm

    monkeypatch.setattr(peak, "GPU_BATCHES", 2)
    monkeypatch.setattr(peak, "GPU_BATCH", 3)
    took_s = peak.time_in_batches(call, lambda: said.append("wait"), lambda: now_s[0])
    assert said == [*["call", "wait"] * 2, *["call"] * 3, "wait", *["call"] * 3, "wait"]
    assert took_s == pytest.approx(0.01)


def test_peaks_are_measured_once_for_all_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = peak.Peaks(8e14, 4e12, 9.89e14, "the data sheet of NVIDIA H200")
    asked: list[object] = []
    monkeypatch.setattr(peak, "measure_peaks_apart", lambda *words: asked.append(words) or found)
    for _ in range(2):
        assert peak.measure_peaks_once("bf16", tmp_path / "peaks.json") == found
    assert peak.measure_peaks_once("bf16", None) == found
    assert len(asked) == 2
