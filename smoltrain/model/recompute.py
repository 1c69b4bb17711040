"""Gradient checkpointing: what blocks keep of their forward pass, and compute again (Chen et al. 2016)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from smoltrain.kernels.cpu_attention import BLOCKED_ATTENTION

# What `selective` keeps: nearly all of the time of a block, in a third of its memory.
ATEN = torch.ops.aten
KEPT_OPERATORS = {
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    BLOCKED_ATTENTION,
}


class GradientCheckpointing:
    """`none`; `full`: every block; n: every n-th block, from the first; `selective`: the cheap parts of all."""

    def __init__(self, mode: Literal["none", "selective", "full"] | int, compiles: bool) -> None:
        named = {"none": 0, "selective": 1, "full": 1}
        self._every = named[mode] if isinstance(mode, str) else mode
        self._options: dict[str, Any] = {}
        if mode == "selective":
            if compiles:  # the compiler computes cheap parts again by itself, and is blind inside of torch's own way
                self._every = 0
            self._options["context_fn"] = partial(create_selective_checkpoint_contexts, _selective_policy)

    def covers_block(self, i: int) -> bool:
        """Whether block i is run again in the backward pass."""
        return self._every > 0 and i % self._every == 0

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """function(*args), once more in the backward pass; the random state is restored for that."""
        return checkpoint(function, *args, use_reentrant=False, **self._options)


def _selective_policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE
