"""The optimizer: its parameter groups, its update, its state, and what the rest of smoltrain must know of it.

An optimizer is described by one class here and chosen by optimizer.kind. It must be elementwise: a weight's
update needs nothing but that weight, its gradient and its state, so that ZeRO may cut flat tensors anywhere
and reshard them. docs/extending.md adds one. Nothing here needs DeepSpeed: estimates and `smoltrain verify`
do without it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, ClassVar

import torch

from smoltrain.config.schema import OptimizerSection
from smoltrain.kernels.compile import CompilableFunction

FP32_BYTES = 4  # of each element of the master weights, and of each tensor of the state


class OptimizerKind(ABC):
    """One optimizer, as engine, resharding, `smoltrain verify` and estimates see it."""

    state_names: ClassVar[tuple[str, ...]]
    """Tensors of its state with an fp32 number for each weight, under torch's names. Anything else in the
    state is a counter: the same on every rank, and kept as it is when the state is resharded."""

    has_one_pass_update: ClassVar[bool] = False
    """Whether `update_in_one_pass` exists; without it torch's own step runs, however gradients are reduced."""

    temporary_bytes: ClassVar[int] = 8
    """Bytes a weight of the largest temporaries in torch's own step on a CPU, for estimates."""

    eager_traffic_bytes: ClassVar[int] = 60
    """Bytes a weight that torch's own step reads and writes on a CPU beyond what one pass does, for estimates."""

    @abstractmethod
    def build(
        self, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device
    ) -> torch.optim.Optimizer:
        """The torch optimizer of `weight_decay_groups`. Its lr is set before each update, by the plan."""

    def update_in_one_pass(
        self, master: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor, scale: float,
        *, group: Mapping[str, Any], state: MutableMapping[str, Any],
    ) -> None:  # fmt: skip
        """One compiled loop: update fp32 `master` and `state` by `gradient` x `scale`, cast the result to `weights`.

        All are flat and of one length. `group` is the parameter group, with lr and weight_decay of this
        step; `state` is empty before the first update.
        """
        raise NotImplementedError

    @property
    def state_bytes(self) -> int:
        """Bytes of the state for each weight."""
        return FP32_BYTES * len(self.state_names)

    @property
    def traffic_bytes(self) -> int:
        """Bytes a weight that one pass reads and writes: master and state both ways, and the gradient once more."""
        return FP32_BYTES + 2 * (FP32_BYTES + self.state_bytes)


class AdamW(OptimizerKind):
    """AdamW (Loshchilov & Hutter 2019)."""

    state_names = ("exp_avg", "exp_avg_sq")
    has_one_pass_update = True

    def build(
        self, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device
    ) -> torch.optim.Optimizer:
        """torch's own, fused on a GPU."""
        betas = (section.beta1, section.beta2)
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=section.eps, fused=device.type == "cuda")

    def update_in_one_pass(
        self, master: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor, scale: float,
        *, group: Mapping[str, Any], state: MutableMapping[str, Any],
    ) -> None:  # fmt: skip
        """See OptimizerKind."""
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        state["step"] += 1
        step = float(state["step"])
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        numbers = (
            scale, 1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
            math.sqrt(1 - beta2**step), group["eps"],
        )  # fmt: skip
        # A tensor, as each new Python number would be compiled anew.
        scalars = torch.tensor(numbers, dtype=torch.float32, device=master.device)
        _adamw_step.compiled(master, state["exp_avg"], state["exp_avg_sq"], weights, gradient, scalars)


@CompilableFunction
def _adamw_step(
    master: torch.Tensor, first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor,
    scalars: torch.Tensor,
) -> None:  # fmt: skip
    """AdamW in place, operation by operation as torch's own; weights: the master's cast."""
    scale, keep, rest1, beta2, rest2, step_size, root2, eps = scalars.unbind()
    g = gradient.float() * scale
    m = first + (g - first) * rest1
    v = second * beta2 + rest2 * g * g
    p = master * keep - step_size * m / (v.sqrt() / root2 + eps)
    first.copy_(m)
    second.copy_(v)
    master.copy_(p)
    weights.copy_(p)


OPTIMIZERS: dict[str, OptimizerKind] = {"adamw": AdamW()}  # by optimizer.kind


def build_optimizer(model: torch.nn.Module, section: OptimizerSection, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the recipe asks for, over all parameters that are trained."""
    return OPTIMIZERS[section.name].build(weight_decay_groups(model), section, device)


def weight_decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: matrices (embeddings too) decay, vectors (norms, biases) never do."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "decays": True},
        {"params": [p for p in parameters if p.dim() < 2], "decays": False},
    ]


def set_hyperparameters(groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
    """Give the parameter groups the values of the coming update."""
    for group in groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def reset_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Zero the state, counters included, as if training began with these weights."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def clipping_factor(norm: float, largest_norm: float) -> float:
    """What a gradient of this norm is multiplied by, so that it does not exceed `largest_norm`; 0 never clips."""
    if largest_norm == 0:
        return 1.0
    return min(1.0, largest_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_


def is_elementwise_state(value: torch.Tensor) -> bool:
    """Whether a tensor of the state has a number for each weight; a counter has none."""
    return value.dim() > 0


def checkpoint_bytes(kind: OptimizerKind, num_parameters: int, weight_bytes: int) -> int:
    """About what one checkpoint takes on disk.

    Compute weights twice, for DeepSpeed and as safetensors; fp32 masters and the optimizer's state once.
    """
    return num_parameters * (2 * weight_bytes + FP32_BYTES + kind.state_bytes)
