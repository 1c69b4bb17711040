"""The protocol between Engine and who reduces a step's gradients and updates the weights.

DeepSpeedSteps (deepspeed_steps.py) leaves both to DeepSpeed; OncePerStep (once_per_step.py) does both itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from smoltrain.data.rows.batch import Batch


@dataclass(frozen=True)
class StepOutcome:
    """What becomes of a step: scalars, which are on the device where the host need not wait for them."""

    applied: Tensor  # bool; False: it was not allowed, or the gradient is not finite, and no rank has moved a weight
    gradient_norm: Tensor  # fp64, global L2 norm before clipping, finite or not

    @classmethod
    def on_host(cls, applied: bool, gradient_norm: float) -> "StepOutcome":
        """Of what DeepSpeed says in Python."""
        return cls(torch.tensor(applied), torch.tensor(gradient_norm, dtype=torch.float64))


class StepMethod(Protocol):
    """From forward to update. `reduce` and `update` are collective, and so is running through `whole_gradients`.

    Of each update the host is to call `finish_update`, when it knows the outcome.
    """

    host_wait: str | None
    """Why the host must wait for the device in `update`; None: it asks for nothing, and may read the outcome later."""

    @property
    def reduction(self) -> str:
        """When gradients are reduced and by what means, for the console."""
        ...

    @property
    def loss_scale(self) -> float:
        """The factor inside fp16 gradients; 1 in any other precision."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses of a micro-batch that is on the device."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, for a mean over the ranks."""
        ...

    def whole_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole gradient before clipping, still scaled by `loss_scale`) of each parameter that has one."""
        ...

    def gradient_sums(self) -> list[Tensor]:
        """Where gradients are added up on this rank, if DeepSpeed does not."""
        ...

    def reduce(self) -> Tensor:
        """Reduce the gradients; the squared L2 norm of this rank's part, fp64 scalar. 0 where `update` does both."""
        ...

    def update(self, squared_norm: Tensor, is_allowed: Tensor | None = None) -> StepOutcome:
        """Clip, and update the weights if that `is_allowed` and the gradient is finite; the gradients are gone then.

        `squared_norm`: the sum over the ranks of what `reduce` gave. `is_allowed`: a bool scalar; None: it is.
        """
        ...

    def finish_update(self, applied: bool) -> None:
        """Count the last update, which was applied or was not."""
        ...
