"""AdamW (Loshchilov & Hutter 2019): torch's own, and the same in one compiled pass over memory."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from smoltrain.config.schema import OptimizerSection
from smoltrain.engine.optimizer_kind import OptimizerKind
from smoltrain.kernels.compile import CompilableFunction
from smoltrain.kernels.device_numbers import send_numbers


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
        self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any], master: torch.Tensor, weights: torch.Tensor,
        gradient: torch.Tensor, verdict: torch.Tensor,
    ) -> None:  # fmt: skip
        """See OptimizerKind."""
        state = optimizer.state[master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        state["step"] = state["step"].cpu()  # where the host reads it; on a GPU if torch's fused step began this run
        step = float(state["step"].numpy()) + 1
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        numbers = (
            1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
            math.sqrt(1 - beta2**step), group["eps"],
        )  # fmt: skip
        # A tensor, as each new Python number would be compiled anew.
        scalars = torch.cat((verdict, send_numbers(numbers, master.device)))
        adamw_step.compiled(master, state["exp_avg"], state["exp_avg_sq"], weights, gradient, scalars)

    def finish_one_pass(self, optimizer: torch.optim.Optimizer, applied: bool) -> None:
        """See OptimizerKind."""
        for state in optimizer.state.values():
            if applied and "step" in state:
                state["step"] += 1

    def masks_own_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """The fused one does, for torch.amp.GradScaler; the others refuse a `found_inf`."""
        return bool(optimizer.defaults.get("fused"))


@partial(CompilableFunction, any_length=True)
def adamw_step(
    master: torch.Tensor, first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor,
    scalars: torch.Tensor,
) -> None:  # fmt: skip
    """AdamW in place, operation by operation as torch's own; weights: the master's cast. Nothing if `moves` is 0."""
    scale, moves, keep, rest1, beta2, rest2, step_size, root2, eps = scalars.unbind()
    is_applied = moves > 0
    g = gradient.float() * scale
    m = first + (g - first) * rest1
    v = second * beta2 + rest2 * g * g
    p = master * keep - step_size * m / (v.sqrt() / root2 + eps)
    p = torch.where(is_applied, p, master)
    first.copy_(torch.where(is_applied, m, first))
    second.copy_(torch.where(is_applied, v, second))
    master.copy_(p)
    weights.copy_(p)
