"""What a language model is to the rest of smoltrain, of whichever kind, and the options of how it computes.

Legend: B batch, T tokens, V vocabulary.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smoltrain.config.schema import AnyModelSection
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.loss import PLAIN_LOSS, LossKernel

SDPA_KERNEL = AttentionKernel("sdpa", "the default")


@dataclass(frozen=True)
class ComputeOptions:
    """How a model computes.

    z_loss changes gradients. With dropout, another attention kernel or `compiles` draws other masks. Apart from these
    two no option changes a number beyond rounding.
    """

    gradient_checkpointing: Literal["none", "selective", "full"] | int = "none"  # an int: of every n-th block
    attention: AttentionKernel | None = None  # None: SDPA where the model has it
    loss: LossKernel = PLAIN_LOSS
    z_loss: float = 0.0
    compiles: bool = False  # whether torch.compile makes the blocks, in training
    compile_region: Literal["block", "model"] = "block"  # each by itself, or all of them and the last norm together
    cuda_graphs: bool = False  # whether that one region is replayed as CUDA graphs
    fused_projections: bool = False  # whether q, k and v are one matrix product, and gate and up


class LanguageModel(nn.Module, ABC):
    """A causal language model: token ids in, logits or the summed cross entropy out; a KV cache continues a text."""

    @property
    @abstractmethod
    def section(self) -> AnyModelSection:
        """The part of the config that this model was built from."""

    @abstractmethod
    def forward(
        self, ids_BT: Tensor, labels_BT: Tensor | None = None, cache: Any = None, *,
        last_only: bool = False, positions_BT: Tensor | None = None, num_documents: int | None = None,
    ) -> Tensor:  # fmt: skip
        """The summed loss of the labels, an fp32 scalar; without labels the logits [B, T, V].

        `labels_BT` are shifted already, and IGNORE_INDEX where there is no target. With a cache (of `new_cache`) the
        ids continue the tokens in it, and are added to it. `last_only` gives the logits of the last token, [B, 1, V].
        `positions_BT` (int64) keeps the documents packed in a row apart: it is a token's place within its document, and
        each row begins a document; each is computed as if it were alone. Not with a cache. None: a row is one text.
        `num_documents` says how many there are at most, so that no device need be asked.
        """

    @abstractmethod
    def new_cache(self, batch: int, max_length: int) -> Any:
        """An empty KV cache for this model, where its weights are and in their dtype; its `length` counts tokens."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """While the block runs the model drops nothing out; afterwards it is in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def logits_differ(before: Tensor, after: Tensor) -> bool:
    """Whether they differ by more than rounding."""
    return bool((before - after).abs().max() > 1e-4 * before.abs().max())
