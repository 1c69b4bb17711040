"""Gradient checkpointing: blocks forget activations of the forward pass and compute them again (Chen et al. 2016)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from smoltrain.errors import Problem, UserError
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.cpu_attention import BLOCKED_ATTENTION
from smoltrain.kernels.joint_linear import JOINT_LINEAR

# What `selective` keeps, beside the operators of the attention kernel: nearly all of the time of a block, in a third of
# its memory. The names of attention are torch's private ones; SDPA's public name hides which of them ran.
KEPT_OPERATORS = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)


class GradientCheckpointing:
    """`none`; `full`: every block; n: every n-th block, from the first; `selective`: the cheap parts of all."""

    def __init__(
        self, mode: Literal["none", "selective", "full"] | int, compiles: bool, attention: AttentionKernel
    ) -> None:
        """Errors: UserError where `selective` would compute matrix products or attention again."""
        self._options: dict[str, Any] = {}
        if isinstance(mode, int):
            self._every = mode
        elif mode == "full":
            self._every = 1
        elif mode == "selective" and not compiles:
            self._every = 1
            self._options["context_fn"] = partial(create_selective_checkpoint_contexts, find_kept_operators(attention))
        else:  # The compiler computes cheap parts again by itself, and is blind inside of torch's own way.
            self._every = 0

    def covers_block(self, i: int) -> bool:
        """Whether block i is run again in the backward pass."""
        return self._every > 0 and i % self._every == 0

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """function(*args), once more in the backward pass; the random state is restored for that."""
        return checkpoint(function, *args, use_reentrant=False, **self._options)


def find_kept_operators(attention: AttentionKernel) -> list[Any]:
    """The operators whose outputs `selective` keeps. Errors: UserError where torch does not know one of them."""
    kept = [BLOCKED_ATTENTION, JOINT_LINEAR]
    for name in (*KEPT_OPERATORS, *attention.operators):
        namespace, operator = name.split("::")
        found = getattr(getattr(torch.ops, namespace), operator, None)
        if found is None:
            saw = f"torch {torch.__version__} without the operator {name}"
            change = "engine.gradient_checkpointing"
            raise UserError(Problem("selective gradient checkpointing cannot run", saw, "full, or none", change))
        kept.append(found.default)
    return kept
