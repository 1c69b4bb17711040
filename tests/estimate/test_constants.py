"""The table of constants: what it must hold for every device, and its correction by a measurement."""

import pytest

from smoltrain.estimate.constants import BUSY_TOKENS, EFFICIENCY, GPU_REACHED_BANDWIDTH, GPUS
from smoltrain.estimate.memory import estimate_memory
from smoltrain.estimate.speed import estimate_speed
from tests.estimate.setups import SMOL, make_setup


def test_every_kind_of_device_has_its_constants():
    assert EFFICIENCY.keys() == BUSY_TOKENS.keys() == {"cuda", "cpu"}
    for rates in EFFICIENCY.values():
        assert all(0 < share < 1 for share in (rates.bandwidth, rates.link, rates.newton_schulz, rates.network))
    assert EFFICIENCY["cuda"].bandwidth < GPU_REACHED_BANDWIDTH < 1
    for name, gpu in GPUS.items():
        assert 0 < gpu.reached_attention[1] < gpu.reached_attention[0] < gpu.reached_matmul < 1
        assert (gpu.name, gpu.kind) == (name, "cuda")
        assert gpu.peak_flops("bf16") == gpu.peak_flops("fp16") == gpu.half_flops > gpu.peak_flops("fp32")


def test_a_measurement_corrects_both():
    case, device = make_setup(recipe=SMOL, device="cuda"), GPUS["l4"]
    rates = EFFICIENCY["cuda"].corrected(estimated_s=2.0, measured_s=3.0)
    assert estimate_speed(case, device, rates).step_s == pytest.approx(1.5 * estimate_speed(case, device).step_s)
    found = 7e9
    base = found - estimate_memory(case, 0.0).total
    assert estimate_memory(case, base).total == pytest.approx(found)
