"""Dropout (Srivastava et al. 2014) with random numbers that are cheap on a CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVELS = 1 << 15  # of a random number that decides about an element


def drop_threshold(rate: float) -> int:
    """Elements whose random level is below this are dropped."""
    return round(rate * NUM_LEVELS) - NUM_LEVELS // 2


def dropout_scale(rate: float) -> float:
    """By how much those that are left are scaled up: 1 / (1 - rate), the rate rounded to a level."""
    return NUM_LEVELS / (NUM_LEVELS // 2 - drop_threshold(rate))


def random_levels(shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
    """For each element a random int16 from -NUM_LEVELS/2 to NUM_LEVELS/2 - 1, each as likely as the others.

    From torch's random state, or from `generator`. Four elements share 64 random bits: on a CPU torch draws on one
    thread, and bernoulli_ would take four times as long.
    """
    numel = math.prod(shape)
    num_draws = math.ceil(numel / 4)
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (num_draws,), generator=generator)  # random_ is not compiled
    return (bits.view(torch.int16) >> 1)[:numel].view(shape)


class FastDropout(nn.Module):
    """F.dropout on every device but a CPU; there the same by `random_levels`, the rate rounded to one of NUM_LEVELS."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape: while training some elements become zero, and the others are scaled up to make up for it."""
        if not self.training or not self.rate:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        return torch.where(random_levels(x.shape) >= drop_threshold(self.rate), x * dropout_scale(self.rate), 0.0)
