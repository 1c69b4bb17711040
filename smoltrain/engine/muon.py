"""Muon (Jordan et al. 2024): the momentum of each hidden matrix is orthogonalised, and that is its update.

Embeddings, head and vectors are AdamW's (hidden_matrices.py tells which is which). Scale and decay are those of Liu et
al. (2025): an update of root mean square 0.2, as AdamW's are about, so that one learning rate serves both.

The state is elementwise: one number for each weight, the momentum, wherever ZeRO has cut. The orthogonalisation alone
needs whole matrices, and matrix_exchange.py gets them. The arithmetic is that of torch.optim.Muon(nesterov=True,
adjust_lr_fn="match_rms_adamw"): tests/engine/test_muon.py compares the two.
"""
# pyright: reportPrivateImportUsage=false
# torch's operations on lists of tensors (_foreach), which are few kernels on a GPU, are not exported.

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smoltrain.config.schema import OptimizerSection
from smoltrain.engine.adamw import AdamW
from smoltrain.engine.hidden_matrices import split_parameters
from smoltrain.engine.matrix_exchange import MatrixExchange, MatrixPlan, plan_matrices
from smoltrain.engine.reshard import ParameterSlice
from smoltrain.errors import Problem, UserError
from smoltrain.kernels.compile import CompilableFunction
from smoltrain.kernels.device_numbers import send_numbers
from smoltrain.kernels.newton_schulz import newton_schulz_flops, orthogonalize

UPDATE_RMS = 0.2  # Liu et al. 2025, section 2.2


class MuonOptimizer(torch.optim.AdamW):
    """torch's AdamW, but for the groups that are marked `hidden`.

    Those hold whole matrices, or, once they are bound to an exchange, flat tensors that slices of matrices lie in.
    """

    def __init__(self, groups: list[dict[str, Any]], section: OptimizerSection, *, fused: bool) -> None:
        betas = (section.beta1, section.beta2)
        super().__init__(groups, lr=0.0, betas=betas, eps=section.eps, fused=fused)
        self._exchanges: dict[Tensor, MatrixExchange] = {}  # by the first of the tensors that are updated together

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As any optimizer's: AdamW's own looks for a count of steps in the state of each tensor."""
        torch.optim.Optimizer.__setstate__(self, state)

    def bind(self, first_tensor: Tensor, exchange: MatrixExchange) -> None:
        """From here on the matrices in a group, of which this is the first tensor, are known by `exchange`."""
        self._exchanges[first_tensor] = exchange

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update what has a gradient, which is gone then. Collective where matrices are bound to several ranks.

        As with torch's fused optimizers nothing moves where `self.found_inf`, if there is one, is 1: a number on the
        device, of which the host knows nothing.
        """
        assert closure is None
        groups = self.param_groups
        for group in groups:
            if group["hidden"]:
                self._update_matrices(group)
        self.param_groups = [group for group in groups if not group["hidden"]]
        try:
            if self.param_groups:  # of none at all torch says on a GPU that all are for CUDA graphs
                super().step()
        finally:
            self.param_groups = groups

    def _update_matrices(self, group: dict[str, Any]) -> None:
        """torch's operations on all tensors of a group, each a pass over memory."""
        momentum = group["momentum"]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        moves = None if found_inf is None else found_inf == 0
        weights = group["params"]
        if weights and weights[0] not in self._exchanges:  # else all ranks must agree on what is updated
            weights = [weight for weight in weights if weight.grad is not None]
        if not weights:
            return
        buffers = [self.momentum_buffer(weight) for weight in weights]
        updates: list[Tensor] = []
        for weight in weights:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            updates.append(gradient.contiguous())
        if moves is None:
            torch._foreach_lerp_(buffers, updates, 1 - momentum)
            torch._foreach_lerp_(updates, buffers, momentum)
        else:
            blends = torch._foreach_lerp(buffers, updates, 1 - momentum)
            torch._foreach_lerp_(updates, blends, momentum)
            replace_where(moves, buffers, blends)
            del blends  # its memory is what the orthogonalisation takes

        self.orthogonalize_updates(group, weights, updates)

        kept = 1 - group["lr"] * group["weight_decay"]
        if moves is None:
            torch._foreach_mul_(weights, kept)
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
        else:
            moved = torch._foreach_mul(weights, kept)
            torch._foreach_add_(moved, updates, alpha=-group["lr"])
            replace_where(moves, weights, moved)

    def momentum_buffer(self, weight: Tensor) -> Tensor:
        """The state of a tensor: zeros before the first update."""
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]

    def orthogonalize_updates(self, group: Mapping[str, Any], weights: Sequence[Tensor], updates: list[Tensor]) -> None:
        """Orthogonalise the matrices that lie in `updates`, and scale them, in place. Collective."""
        steps = group["newton_schulz_steps"]

        def make_updates(matrices: list[Tensor]) -> list[Tensor]:
            results = orthogonalize(matrices, steps)
            scales = [UPDATE_RMS * math.sqrt(max(result.shape)) for result in results]
            torch._foreach_mul_(results, scales)
            return results

        exchange = self._exchanges.get(weights[0])
        if exchange is None:
            exchange = MatrixExchange(plan_whole_matrices(updates, 1, steps))
        exchange.replace_matrices([update.view(-1) for update in updates], make_updates)


def replace_where(moves: Tensor, tensors: Sequence[Tensor], numbers: Sequence[Tensor]) -> None:
    """Put `numbers` in the place of the tensors where `moves`, a bool scalar, is true; else they keep every bit."""
    for tensor, new in zip(tensors, numbers, strict=True):
        torch.where(moves, new, tensor, out=tensor)


def plan_whole_matrices(matrices: Sequence[Tensor], num_ranks: int, steps: int) -> MatrixPlan:
    """The plan for matrices that every rank holds whole, each in a tensor of its own."""
    shapes = {str(i): (matrix.size(0), matrix.size(1)) for i, matrix in enumerate(matrices)}
    slices = [ParameterSlice(i, str(i), 0, matrix.numel(), 0) for i, matrix in enumerate(matrices)]
    return plan_matrices(shapes, [slices] * num_ranks, functools.partial(newton_schulz_flops, steps=steps))


class Muon(AdamW):
    """See the module."""

    hidden_state_names = ("momentum_buffer",)

    def parameter_groups(self, model: torch.nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
        """Hidden matrices, embeddings with the head, other tensors, vectors; a group that were empty is left out.

        Errors: UserError for a model without a hidden matrix.
        """
        split = split_parameters(model)
        if not split.hidden:
            saw = "no weight of two dimensions between the embedding and the head"
            want = "adamw, or a model with hidden matrices"
            raise UserError(Problem("muon has nothing to orthogonalise", saw, want, "optimizer.kind"))
        numbers = {"momentum": section.momentum, "newton_schulz_steps": section.newton_schulz_steps}
        factor = section.embedding_lr_factor
        groups: list[dict[str, Any]] = [
            {"params": list(split.hidden.values()), "decays": True, "hidden": True, **numbers},
            {"params": list(split.tables.values()), "decays": True, "hidden": False, "lr_factor": factor},
            {"params": list(split.others.values()), "decays": True, "hidden": False},
            {"params": list(split.vectors.values()), "decays": False, "hidden": False},
        ]
        return [group for group in groups if group["params"]]

    def describe(self, model: torch.nn.Module) -> str:
        """See OptimizerKind."""
        return split_parameters(model).describe()

    def build(
        self, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device
    ) -> torch.optim.Optimizer:
        """AdamW's part is fused on a GPU."""
        return MuonOptimizer(groups, section, fused=device.type == "cuda")

    def update_in_one_pass(
        self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any], master: Tensor, weights: Tensor,
        gradient: Tensor, verdict: Tensor,
    ) -> None:  # fmt: skip
        """Of a hidden group one pass before the orthogonalisation, and one after it. See OptimizerKind."""
        if not group["hidden"]:
            super().update_in_one_pass(optimizer, group, master, weights, gradient, verdict)
            return
        assert isinstance(optimizer, MuonOptimizer)
        update = gradient.float()  # which is the gradient itself, if it is in fp32
        numbers = torch.cat((verdict, send_numbers((1 - group["momentum"],), master.device)))
        blend_momentum.compiled(optimizer.momentum_buffer(master), update, numbers)
        optimizer.orthogonalize_updates(group, [master], [update])
        lr = group["lr"]
        numbers = torch.cat((verdict, send_numbers((1 - lr * group["weight_decay"], lr), master.device)))
        apply_update.compiled(master, weights, update, numbers)


@functools.partial(CompilableFunction, any_length=True)
def blend_momentum(buffer: Tensor, update: Tensor, numbers: Tensor) -> None:
    """`update` is the gradient before, and its blend with the momentum (Nesterov's) after. See OptimizerKind."""
    scale, moves, rest = numbers.unbind()
    g = update * scale
    m = buffer + (g - buffer) * rest
    buffer.copy_(torch.where(moves > 0, m, buffer))
    update.copy_(m - (m - g) * rest)


@functools.partial(CompilableFunction, any_length=True)
def apply_update(master: Tensor, weights: Tensor, update: Tensor, numbers: Tensor) -> None:
    """Decay, move, and cast to the weights. See OptimizerKind."""
    _, moves, keep, lr = numbers.unbind()
    p = torch.where(moves > 0, master * keep - lr * update, master)
    master.copy_(p)
    weights.copy_(p)
