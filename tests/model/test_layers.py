"""The parts of a decoder block: rotary positions and norms, exact where a bf16 model would round."""

from typing import Any

import pytest
import torch

from smoltrain.model.layers import apply_rotary, compute_rotary_angles
from tests.model.tiny_decoders import GPT2, LLAMA, batch, decoder


def test_positions_stay_exact_in_a_bf16_model():
    model = decoder(LLAMA, max_position_embeddings=8192).bfloat16()
    assert not list(model.buffers())  # nothing that a cast, a checkpoint or DeepSpeed could round
    positions = torch.arange(8192)
    cos, sin = compute_rotary_angles(positions, 64, 10000.0)
    angles = positions.double()[:, None] / 10000.0 ** (torch.arange(0, 64, 2).double() / 64)
    assert cos.dtype == torch.float32
    assert (cos - angles.cos()).abs().max() < 1e-3  # fp32 angles near 8192 are this fine; bf16 ones are off by 16
    assert (sin - angles.sin()).abs().max() < 1e-3
    assert model(batch()[0]).dtype == torch.bfloat16


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        a, b = (
            apply_rotary(x[None], compute_rotary_angles(torch.tensor([p]), 16, 10000.0)) for x, p in ((q, i), (k, j))
        )
        return float((a * b).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["rmsnorm", "layernorm"])
def test_norms_work_in_fp32_inside(shape: dict[str, Any]):
    layer = decoder(shape).norm
    x = 100 + torch.randn(4, 32, generator=torch.Generator().manual_seed(0))  # bf16 sums would lose the variance
    x = x.bfloat16()
    want = layer(x.float())
    torch.testing.assert_close(layer.bfloat16()(x).float(), want, rtol=2**-8, atol=1e-3)  # rounded once, at the end
