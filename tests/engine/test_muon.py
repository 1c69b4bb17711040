"""Muon against torch.optim.Muon with AdamW in a plain loop: same rows, same losses, same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from tests import tiny
from tests.engine.test_engine import PLAN, STEPS, engine_losses, furthest, plain_losses

MUON = ("optimizer.kind=muon", "optimizer.embedding_lr_factor=0.5")


def iterate_in_fp32(
    gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """torch.optim.Muon's Newton-Schulz iterations without its cast to bf16."""
    a, b, c = coefficients
    tall = gradient.size(0) > gradient.size(1)
    X = gradient.T if tall else gradient
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.T if tall else X


@contextmanager
def newton_schulz_in_fp32() -> Iterator[None]:
    """Inside, ours and torch's iterations are in fp32: in bf16 they make 5e-5 of a loss out of its last bit."""
    from torch.optim import _muon

    from smoltrain.kernels import newton_schulz

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newton_schulz, "choose_dtype", lambda *_: (torch.float32, "as the test asks"))
        patch.setattr(_muon, "_zeropower_via_newtonschulz", iterate_in_fp32)
        yield


def muon_losses(settings: Config, precision: str) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """See engine_losses; runs on every rank."""
    with newton_schulz_in_fp32():
        return engine_losses(settings, precision, STEPS)


WAYS = [(0, "auto"), (1, "step"), (1, "micro_batch"), (2, "step"), (2, "micro_batch"), (3, "auto")]  # stage, reduce
QUICK = {(2, "step", 2), (3, "auto", 2)}
CASES = [
    pytest.param(*way, size, marks=() if (*way, size) in QUICK else pytest.mark.slow) for way in WAYS for size in (1, 2)
]


@pytest.mark.parametrize(("stage", "reduce", "size"), CASES)
def test_fp32_equals_plain_torch_at_every_zero_stage(
    tmp_path: Path, ranks: Any, stage: int, reduce: str, size: int
) -> None:
    options = (f"engine.ds_config=zero{stage}", "engine.precision=fp32", f"engine.reduce_gradients={reduce}")
    settings = tiny.load(tmp_path, *PLAN, *options, *MUON)
    prepare_run_data(settings)
    with newton_schulz_in_fp32():
        expected, expected_norms, expected_weights = plain_losses(settings, bf16=False, size=size)
    for losses, norms, weights in ranks(size).run(muon_losses, settings, "fp32"):
        assert losses == pytest.approx(expected, abs=1e-6)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert furthest(weights, expected_weights) < 1e-5
    assert expected[-1] < expected[0] - 0.5, "the reference itself must learn, or agreement proves nothing"
