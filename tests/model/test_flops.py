"""How much a decoder computes."""

import pytest

from smoltrain.model.flops import flops_per_token


def test_a_published_model_reaches_its_published_share_of_the_peak() -> None:
    """llm-foundry's MPT-125M: 142,830 tokens/s on each A100 (312 TFLOP/s) are 44.8 % at T 2048."""
    mpt = flops_per_token(parameters=125_311_488, layers=12, width=768, sequence_length=2048)
    assert mpt * 142_830 / 312e12 == pytest.approx(0.448, abs=0.001)
