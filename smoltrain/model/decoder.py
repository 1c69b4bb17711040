"""The decoder: token ids in, logits or the summed loss out.

Legend: B batch, T tokens, D width of the residual stream, V vocabulary.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smoltrain.model.attention import Documents, Kernel
from smoltrain.model.interface import LanguageModel
from smoltrain.model.layers import Block, KVCache, norm, rotary_angles
from smoltrain.model.loss import summed_cross_entropy
from smoltrain.schema import ModelSection

SDPA = Kernel("sdpa", "the default")


class Decoder(LanguageModel):
    """A pre-norm decoder in the shape of Llama or GPT-2, as `section` says. Make it with `fresh`."""

    def __init__(self, section: ModelSection, kernel: Kernel, recompute_every: int) -> None:
        super().__init__()
        self._section = section
        self.kernel, self.recompute_every = kernel, recompute_every
        V, D = section.vocab_size, section.hidden_size
        self.embed_tokens = nn.Embedding(V, D)
        learned = section.positions == "learned"
        self.embed_positions = nn.Embedding(section.max_position_embeddings, D) if learned else None
        self.dropout = nn.Dropout(section.dropout)
        self.layers = nn.ModuleList(Block(section, kernel, i) for i in range(section.num_hidden_layers))
        self.norm = norm(section)
        self.lm_head = None if section.tie_word_embeddings else nn.Linear(D, V, bias=False)

    @property
    def section(self) -> ModelSection:
        """The decoder's shape."""
        return self._section

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights from torch's global random state: normal for matrices, ones for norms, zeros for biases.

        The two projections that write to the residual stream are scaled by 1 / sqrt(2 * blocks), since that many
        terms add up in it (GPT-2: Radford et al. 2019, section 2.3).
        """
        std = self.section.initializer_range
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1.0)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(0.0, std / (2 * len(self.layers)) ** 0.5 if writes else std)

    def forward(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """See LanguageModel."""
        assert cache is None or positions_BT is None, "a cache continues one text, not packed documents"
        x_BTD = self.embed_tokens(ids_BT)
        if positions_BT is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + ids_BT.size(1), device=ids_BT.device)
            documents = None
        else:
            positions = positions_BT
            documents = Documents.packed(positions_BT, self.kernel, x_BTD.dtype)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(positions)
            rotary = None
        else:
            head_width = self.section.hidden_size // self.section.num_attention_heads
            rotary = rotary_angles(positions.unsqueeze(-2), head_width, self.section.rope_theta)  # alike in all heads
        x_BTD = self.dropout(x_BTD)
        for i, block in enumerate(self.layers):
            if self.training and self.recompute_every and i % self.recompute_every == 0:
                # Keep the input only and run the block again in the backward pass (Chen et al. 2016).
                x_BTD = checkpoint(block, x_BTD, rotary, cache, documents, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, cache, documents)
        if cache is not None:
            cache.length += ids_BT.size(1)
        if last_only:
            x_BTD = x_BTD[:, -1:]  # prompt x vocabulary logits can be larger than all activations
        x_BTD = self.norm(x_BTD)
        head_VD = (self.lm_head or self.embed_tokens).weight
        if labels_BT is None:
            return F.linear(x_BTD, head_VD)
        return summed_cross_entropy(x_BTD.flatten(0, 1), head_VD, labels_BT.flatten())

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty key-value cache for this model, where its weights are and in their dtype."""
        weight = self.embed_tokens.weight
        return KVCache(self.section, batch, max_length, device=weight.device, dtype=weight.dtype)


def fresh(
    section: ModelSection,
    gradient_checkpointing: Literal["none", "full"] | int,
    attention: Kernel | None,
    device: torch.device | str,
) -> Decoder:
    """See kinds.build."""
    named = {"none": 0, "full": 1}
    every = named[gradient_checkpointing] if isinstance(gradient_checkpointing, str) else gradient_checkpointing
    with torch.device("meta"):  # skips the initialization of torch's own layers
        decoder = Decoder(section, attention or SDPA, every)
    if torch.device(device).type != "meta":
        decoder.to_empty(device=device)
        decoder.initialize()
    return decoder
