"""Several linear layers of one input as one matrix product, over weights that lie side by side in memory.

ZeRO-1 and 2 lay the weights of a parameter group end to end, in the order of the model: behind q_proj's come k_proj's
and v_proj's, which read as one are the matrix [q; k; v]. So nothing is copied, and the layers keep parameters of their
own, whose names, gradients, optimizer state and, under Muon, orthogonalisation are what they are without this.

Legend: D inputs, F outputs of all layers together.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def joint_linear(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What each layer makes of x [..., D], by one product. All of them have a bias, or none."""
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(weights))
    return _joint_linear(x, weights, biases).split([layer.out_features for layer in layers], dim=-1)


def find_layers_apart(model: nn.Module) -> str | None:
    """The first layers, by name, that are computed jointly and whose weights do not lie side by side; None if all do.

    A module names such layers in `joint_layers`, a tuple of tuples.
    """
    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        for layers in getattr(module, "joint_layers", ()):
            if not lie_side_by_side([layer.weight for layer in layers]):
                return ", ".join(names[layer] for layer in layers)
    return None


def lie_side_by_side(parts: Sequence[Tensor]) -> bool:
    """Whether each tensor begins where the one before it ends, in the same memory."""
    for before, after in pairwise(parts):
        if before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr():
            return False
        if before.storage_offset() + before.numel() != after.storage_offset():
            return False
    return all(part.is_contiguous() and part.numel() > 0 for part in parts)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """The parts as one tensor, end to end. Copied where they lie apart: in a model without ZeRO."""
    if not lie_side_by_side(parts):
        return torch.cat(list(parts))
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return parts[0].as_strided(shape, parts[0].stride())


# Operators of torch, so that the compiler need not know where weights lie.
@torch.library.custom_op("smoltrain::joint_linear", mutates_args=())
def _joint_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """x [..., D] through all layers: [..., F]."""
    return F.linear(x, _join(weights), _join(biases) if biases else None)


@torch.library.custom_op("smoltrain::joint_linear_backward", mutates_args=())
def _joint_linear_backward(
    dout: Tensor, x: Tensor, weights: list[Tensor], has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [..., D], of the weights [F, D], and of the biases [F] (without any: [0])."""
    dout_NF = dout.flatten(0, -2)
    dx = (dout_NF @ _join(weights)).view(x.shape)
    dweights = dout_NF.mT @ x.flatten(0, -2)
    dbiases = dout_NF.sum(0) if has_bias else dout.new_empty(0)
    return dx, dweights, dbiases


@_joint_linear.register_fake
def _fake_forward(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    del biases  # of the operator's signature; only shapes are asked for
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))


@_joint_linear_backward.register_fake
def _fake_backward(dout: Tensor, x: Tensor, weights: list[Tensor], has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_outputs = dout.size(-1)
    dweights = weights[0].new_empty(num_outputs, weights[0].size(1))
    return x.new_empty(x.shape), dweights, dout.new_empty(num_outputs if has_bias else 0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weights, biases = inputs
    ctx.has_bias = len(biases) > 0
    ctx.save_for_backward(x, *weights)


def _autograd_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    dx, dweights, dbiases = _joint_linear_backward(dout, x, list(weights), ctx.has_bias)
    sizes = [len(weight) for weight in weights]
    of_biases = list(dbiases.split(sizes)) if ctx.has_bias else []
    return dx, list(dweights.split(sizes)), of_biases


_joint_linear.register_autograd(_autograd_backward, setup_context=_save_for_backward)
JOINT_LINEAR = torch.ops.smoltrain.joint_linear.default
