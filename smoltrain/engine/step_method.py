"""The protocol between Engine and who reduces a step's gradients and updates the weights.

DeepSpeedSteps (deepspeed_steps.py) leaves both to DeepSpeed; OncePerStep (once_per_step.py) does both itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from smoltrain.data.rows.batch import Batch


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step."""

    applied: bool  # False: the gradient was not finite, and every rank skipped the update
    gradient_norm: float  # global L2 norm before clipping; inf where the update was skipped


SKIPPED = StepOutcome(applied=False, gradient_norm=math.inf)


class StepMethod(Protocol):
    """From forward to update. `reduce` and `update` are collective, and so is running through `whole_gradients`."""

    @property
    def reduction(self) -> str:
        """When gradients are reduced and by what means, for the console."""
        ...

    @property
    def loss_scale(self) -> float:
        """The factor inside fp16 gradients; 1 in any other precision."""
        ...

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the token losses of a micro-batch that is on the device."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`, for a mean over the ranks."""
        ...

    def whole_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole gradient before clipping, still scaled by `loss_scale`) of each parameter that has one."""
        ...

    def reduce(self) -> float:
        """Reduce the gradients; the squared L2 norm of this rank's part. 0 where `update` does both."""
        ...

    def update(self, squared_norm: float | None = None) -> StepOutcome:
        """Clip, and update the weights.

        `squared_norm`: the sum over the ranks of what `reduce` gave; None: it is added up here.
        """
        ...

    def discard_gradients(self) -> None:
        """Forget what was accumulated, as if it had not been: no weight moves, and no loss scale."""
        ...
