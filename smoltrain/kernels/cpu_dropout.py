"""Dropout (Srivastava et al. 2014) with random numbers that are cheap on a CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVELS = 1 << 15  # of a random number that decides about an element


def drop_threshold(rate: float) -> int:
    """An element is dropped whose level is less than this."""
    return round(rate * NUM_LEVELS) - NUM_LEVELS // 2


def dropout_scale(rate: float) -> float:
    """By how much those that are left are scaled up: 1 / (1 - rate), as the levels have it."""
    return NUM_LEVELS / (NUM_LEVELS // 2 - drop_threshold(rate))


def random_levels(shape: torch.Size, draws: torch.Generator | None = None) -> Tensor:
    """An even random int16 number of LEVELS for each element, around 0, from torch's random state or from `draws`.

    Four share 64 random bits: on a CPU torch draws on one thread, and bernoulli_ would take four times as long.
    """
    numel = math.prod(shape)
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (math.ceil(numel / 4),), generator=draws)  # random_ is not compiled
    return (bits.view(torch.int16) >> 1)[:numel].view(shape)


class FastDropout(nn.Module):
    """torch's on every device but a CPU, and there the same with `levels`: the rate is rounded to one of LEVELS."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Zero some elements while training, and scale the others up by as much."""
        if not self.training or not self.rate:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        return torch.where(random_levels(x.shape) >= drop_threshold(self.rate), x * dropout_scale(self.rate), 0.0)
