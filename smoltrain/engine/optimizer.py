"""The optimizers, by optimizer.kind, and what is alike for all: hyperparameters, reset, clipping, sizes.

What one is says optimizer_kind.py. Nothing here needs DeepSpeed: estimates and `smoltrain verify` do without it.
"""

from collections.abc import Iterable
from typing import Any

import torch

from smoltrain.config.schema import OptimizerSection
from smoltrain.engine.adamw import AdamW
from smoltrain.engine.muon import Muon
from smoltrain.engine.optimizer_kind import FP32_BYTES, OptimizerKind

OPTIMIZERS: dict[str, OptimizerKind] = {"adamw": AdamW(), "muon": Muon()}  # by optimizer.kind


def build_optimizer(model: torch.nn.Module, section: OptimizerSection, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the recipe asks for, over all parameters that are trained."""
    kind = OPTIMIZERS[section.kind]
    optimizer = kind.build(kind.parameter_groups(model, section), section, device)
    optimizer.register_load_state_dict_pre_hook(_keep_own_settings)
    return optimizer


def _keep_own_settings(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint brings back is the state: a step that is fused on a GPU is not on the CPU that wrote it."""
    own_groups = optimizer.state_dict()["param_groups"]
    own_sizes = [len(group["params"]) for group in own_groups]
    if own_sizes != [len(group["params"]) for group in saved["param_groups"]]:
        return None  # torch refuses it
    return saved | {"param_groups": own_groups}


def set_hyperparameters(groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
    """Give the parameter groups the values of the coming update."""
    for group in groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def reset_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Zero the state, counters included, as if training began with these weights."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def clipping_factor(norm: torch.Tensor, largest_norm: float) -> torch.Tensor:
    """What a gradient of this norm is multiplied by, so that it does not exceed `largest_norm`; 0 never clips."""
    if largest_norm == 0:
        return torch.ones_like(norm)
    return (largest_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_


def checkpoint_bytes(kind: OptimizerKind, num_hidden: int, num_other: int, weight_bytes: int) -> int:
    """About what one checkpoint takes on disk, for so many weights of hidden matrices and so many others.

    Compute weights, fp32 masters and the optimizer's state.
    """
    num_parameters = num_hidden + num_other
    return num_parameters * (weight_bytes + FP32_BYTES) + kind.state_bytes(num_hidden, num_other)
