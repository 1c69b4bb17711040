"""Dropout on a CPU: torch's own, but for where the random numbers come from."""

import pytest
import torch
from torch import Tensor

from smoltrain.kernels.cpu_dropout import NUM_LEVELS, FastDropout, drop_threshold, dropout_scale, random_levels


def drop(x: Tensor, rate: float, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FastDropout(rate)(x)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_many_are_dropped_and_the_expectation_stays(rate: float, dtype: torch.dtype) -> None:
    x = torch.ones(1000, 1000, dtype=dtype)
    out = drop(x, rate)
    assert out.dtype == dtype
    dropped = (out == 0).double().mean()
    assert abs(dropped - rate) < 5 * (rate * (1 - rate) / out.numel()) ** 0.5 + 1 / NUM_LEVELS
    assert out.unique().tolist() == [0.0, float(torch.tensor(dropout_scale(rate), dtype=dtype))]
    assert dropout_scale(rate) == pytest.approx(1 / (1 - rate), rel=10 / NUM_LEVELS)


def test_levels_are_even_and_independent() -> None:
    drawn = random_levels(torch.Size((64, 1001)), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int16
    assert (int(drawn.min()), int(drawn.max())) == pytest.approx((-NUM_LEVELS // 2, NUM_LEVELS // 2 - 1), abs=30)
    counts = torch.histc(drawn.float(), 16, -NUM_LEVELS // 2, NUM_LEVELS // 2)
    assert (counts / counts.mean() - 1).abs().max() < 5 * (16 / drawn.numel()) ** 0.5
    centred = drawn.double().flatten() + 0.5
    for shift in (1, 2, 3, 4, 1001):  # 4: of another draw
        correlation = (centred * centred.roll(shift)).mean() / centred.square().mean()
        assert abs(correlation) < 5 / drawn.numel() ** 0.5, shift


def test_the_same_random_state_drops_the_same() -> None:
    x = torch.randn(50, 7)
    assert torch.equal(drop(x, 0.5, 3), drop(x, 0.5, 3))
    assert not torch.equal(drop(x, 0.5, 3), drop(x, 0.5, 4))


def test_the_gradient_is_dropped_alike() -> None:
    x = torch.ones(50, 7, requires_grad=True)
    out = drop(x, 0.3)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out)


def test_nothing_is_dropped_and_drawn_where_nothing_should_be() -> None:
    x, state = torch.ones(8), torch.get_rng_state()
    assert FastDropout(0.0)(x) is x
    assert FastDropout(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert drop_threshold(0.0) == -NUM_LEVELS // 2
