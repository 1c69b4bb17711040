"""The device of a rank."""

from types import SimpleNamespace

import pytest
import torch

from smoltrain.distributed.memory_limits import find_rank_limit
from smoltrain.estimate import devices
from smoltrain.estimate.constants import GPU_OF_CUDA_NAME, GPUS, TERA
from smoltrain.estimate.devices import (
    find_device,
    find_device_of_run,
    find_gpu_peak,
    measure_cpu_peak,
    measure_matmul_flops,
)


def test_the_matmul_peak_counts_a_multiplication_and_an_addition_each():
    assert measure_matmul_flops(torch.float32, size=10, measure_s=lambda call: 0.5) == 2 * 10**3 / 0.5


def test_the_ranks_of_a_cpu_share_it(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(devices, "measure_matmul_flops", lambda dtype: 8e9 if dtype == torch.float32 else 16e9)
    monkeypatch.setattr(devices, "_measure_copy_bandwidth", lambda: 4e9)
    one, four = (find_device("cpu", world) for world in (1, 4))
    assert (one.fp32_flops, one.half_flops, one.bandwidth) == (8e9, 16e9, 4e9)
    assert (one.peak_flops("fp32"), one.peak_flops("bf16")) == (8e9, 16e9)
    assert (four.fp32_flops, four.half_flops, four.bandwidth, four.link) == (2e9, 4e9, 1e9, 1e9)
    assert four.memory == one.memory / 4
    assert find_device("l4", 4) == find_device("l4", 1) == GPUS["l4"]
    assert torch.get_num_threads() == threads


def test_a_gpu_is_known_by_the_name_that_cuda_gives_it(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda", 0)
    assert set(GPU_OF_CUDA_NAME.values()) == set(GPUS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    peak = find_gpu_peak(device, "bf16")
    assert (peak.flops, peak.source) == (989 * TERA, "the data sheet of NVIDIA H100 80GB HBM3")
    assert find_gpu_peak(device, "fp32").flops == 67 * TERA
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")  # another peak
    peak = find_gpu_peak(device, "bf16")
    assert (peak.flops, peak.source) == (None, "no data sheet of NVIDIA H100 PCIe is known here")
    assert find_gpu_peak(torch.device("mps"), "bf16").flops is None


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_measuring_the_peak_leaves_no_trace_in_training(precision: str):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        assert 1e8 < measure_cpu_peak(precision) < 1e16
        assert torch.get_num_threads() == 1
        assert torch.equal(state, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)


def test_the_fastest_call_within_the_budget_counts_and_the_first_only_warms_up(monkeypatch: pytest.MonkeyPatch):
    """By CPU time: the wall clock runs three times as fast, as other processes have the core in between."""
    cpu_s = [0.0]
    monkeypatch.setattr(devices.time, "thread_time", lambda: cpu_s[0])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: 3 * cpu_s[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def fastest_of(*calls_s: float) -> float:
        cpu_s[0] = 0.0
        took = iter(calls_s)

        def call() -> None:
            cpu_s[0] += next(took)

        return devices._fastest_on_one_core(call)

    assert fastest_of(0.001, 0.012, 0.009, 0.0125, 9.0) == pytest.approx(0.009)
    assert 3 * cpu_s[0] == pytest.approx(0.1035), "no call begins after PEAK_BUDGET_S"
    assert fastest_of(1.0, 2.0, 9.0) == pytest.approx(2.0), "a slow machine calls twice"


def test_the_peak_is_that_of_all_cores_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "num_cores", lambda: 3)
    seconds = [0.5, 1.0, 2.0]
    monkeypatch.setattr(devices, "_fastest_on_one_core", lambda call: seconds.pop())
    assert measure_cpu_peak("fp32") == pytest.approx(2 * devices.PEAK_SIZE**3 * (2 + 1 + 0.5))


def test_the_device_of_a_run_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, whose = find_device_of_run(torch.device("cpu"), 4e12, 2)
    assert (cpu.half_flops, cpu.kind, whose) == (2e12, "cpu", "this machine")
    assert cpu.memory == pytest.approx(find_rank_limit(2).num_bytes, rel=0.01)
    assert cpu.bandwidth > 0
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=20 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    gpu, whose = find_device_of_run(torch.device("cuda"), None, 1)
    assert (gpu.name, gpu.memory, whose) == ("l4", 20 * 2**30, "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B300")
    gpu, whose = find_device_of_run(torch.device("cuda"), None, 1)
    assert (gpu.name, whose) == ("a100-80", "a100-80, as no data sheet of NVIDIA B300 is known here")
