"""What an optimizer is to the rest of smoltrain: one class, whose sub-classes are adamw.py and muon.py.

Its state is elementwise: tensors with an fp32 number for each weight, so that ZeRO may cut flat tensors anywhere and
reshard them. An update that needs whole matrices (muon.py) fetches them when it is due. docs/extending.md adds an
optimizer. Nothing here needs DeepSpeed: estimates and `smoltrain verify` do without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from smoltrain.config.schema import OptimizerSection

FP32_BYTES = 4  # of each element of the master weights, and of each tensor of the state


class OptimizerKind(ABC):
    """One optimizer, as engine, resharding, `smoltrain verify` and estimates see it."""

    state_names: ClassVar[tuple[str, ...]]
    """Tensors of its state with an fp32 number for each weight, under torch's names. Anything else in the
    state is a counter: the same on every rank, and kept as it is when the state is resharded."""

    hidden_state_names: ClassVar[tuple[str, ...] | None] = None
    """The same of a parameter group that is marked `hidden` (hidden_matrices.py); None: no other than any."""

    has_one_pass_update: ClassVar[bool] = False
    """Whether `update_in_one_pass` exists; without it torch's own step runs, however gradients are reduced."""

    temporary_bytes: ClassVar[int] = 8
    """Bytes a weight of the largest temporaries in torch's own step on a CPU, for estimates."""

    eager_traffic_bytes: ClassVar[int] = 60
    """Bytes a weight that torch's own step reads and writes on a CPU beyond what one pass does, for estimates."""

    def parameter_groups(self, model: torch.nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:  # noqa: ARG002
        """torch's parameter groups, each with `decays`. Of `lr_factor`, if it has one, its rate is a multiple.

        Errors: UserError for a model that is not for this optimizer.
        """
        return weight_decay_groups(model)

    def describe(self, model: torch.nn.Module) -> str:
        """For the console: which parameters it updates, and how. `model` as `build_model` makes it."""
        num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return f"{type(self).__name__.lower()} for {num_parameters:,} parameters"

    @abstractmethod
    def build(
        self, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device
    ) -> torch.optim.Optimizer:
        """The torch optimizer of `parameter_groups`. Its lr is set before each update, by the plan."""

    def update_in_one_pass(
        self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any], master: torch.Tensor, weights: torch.Tensor,
        gradient: torch.Tensor, verdict: torch.Tensor,
    ) -> None:  # fmt: skip
        """Compiled loops: update fp32 `master` and its state by the scaled `gradient`, cast the result to `weights`.

        All are flat and of one length; `gradient` may be overwritten. `verdict`: two fp32 numbers on the device, of
        which the host knows nothing: what the gradient is multiplied by, and 1, or 0 for an update after which
        master, state and weights are bit for bit as before, whatever the gradient is. `group` is the parameter group,
        with lr and weight_decay of this step; optimizer.state[master] is empty before the first update. Collective.
        """
        raise NotImplementedError

    def finish_one_pass(self, optimizer: torch.optim.Optimizer, applied: bool) -> None:  # noqa: B027
        """The host knows what became of the last update of all groups: counters in the state move now."""

    def masks_own_step(self, optimizer: torch.optim.Optimizer) -> bool:  # noqa: ARG002
        """Whether torch's own step leaves everything as it is where `optimizer.found_inf`, a tensor, is 1."""
        return False

    def names_of_state(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The elementwise tensors of a parameter group's state."""
        if self.hidden_state_names is None or not group.get("hidden"):
            return self.state_names
        return self.hidden_state_names

    def state_bytes(self, num_hidden: int, num_other: int) -> int:
        """Bytes of the state for so many weights of hidden matrices, and so many others."""
        hidden = len(self.names_of_state({"hidden": True}))
        other = len(self.state_names)
        return FP32_BYTES * (hidden * num_hidden + other * num_other)

    def traffic_bytes(self, num_hidden: int, num_other: int) -> int:
        """Bytes that one pass reads and writes: master and state both ways, and the gradient once more."""
        return 3 * FP32_BYTES * (num_hidden + num_other) + 2 * self.state_bytes(num_hidden, num_other)


def weight_decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: matrices (embeddings too) decay, vectors (norms, biases) never do."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "decays": True},
        {"params": [p for p in parameters if p.dim() < 2], "decays": False},
    ]


def is_elementwise_state(value: torch.Tensor) -> bool:
    """Whether a tensor of the state has a number for each weight; a counter has none."""
    return value.dim() > 0
