"""smoltrain's own decoder: token ids in, logits or the summed cross entropy out.

Legend: B batch, T tokens, D width of the residual stream, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smoltrain.config.schema import ModelSection
from smoltrain.kernels.attention import PackedDocuments
from smoltrain.kernels.compile import CompilableFunction
from smoltrain.kernels.cpu_dropout import FastDropout
from smoltrain.kernels.loss import summed_cross_entropy
from smoltrain.model.interface import SDPA_KERNEL, ComputeOptions, LanguageModel
from smoltrain.model.layers import DecoderBlock, KVCache, RotaryAngles, compute_rotary_angles, make_norm
from smoltrain.model.recompute import GradientCheckpointing


class Decoder(LanguageModel):
    """A pre-norm decoder in the shape of Llama or GPT-2, as `section` says. Make it with `build_decoder`."""

    def __init__(self, section: ModelSection, computing: ComputeOptions) -> None:
        super().__init__()
        self._section = section
        self._computing = computing
        self._kernel = computing.attention or SDPA_KERNEL
        self._recompute = GradientCheckpointing(computing.gradient_checkpointing, computing.compiles, self._kernel)
        V = section.vocab_size
        D = section.hidden_size
        self.embed_tokens = nn.Embedding(V, D)
        learned = section.positions == "learned"
        self.embed_positions = nn.Embedding(section.max_position_embeddings, D) if learned else None
        self.dropout = FastDropout(section.dropout)
        fused = computing.fused_projections
        blocks = (DecoderBlock(section, self._kernel, i, fused=fused) for i in range(section.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = make_norm(section)
        self.lm_head = None if section.tie_word_embeddings else nn.Linear(D, V, bias=False)

    @property
    def section(self) -> ModelSection:
        """The decoder's shape."""
        return self._section

    @torch.no_grad()
    def init_weights(self) -> None:
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
        self, ids_BT: Tensor, labels_BT: Tensor | None = None, cache: KVCache | None = None, *,
        last_only: bool = False, positions_BT: Tensor | None = None, num_documents: int | None = None,
    ) -> Tensor:  # fmt: skip
        """See LanguageModel."""
        assert cache is None or positions_BT is None, "a cache continues one text, not packed documents"
        x_BTD = self._embed_tokens(ids_BT)
        if positions_BT is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + ids_BT.size(1), device=ids_BT.device)
            documents = None
        else:
            positions = positions_BT
            documents = PackedDocuments.from_positions(positions_BT, self._kernel, x_BTD.dtype, num_documents)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(positions)
            rotary = None
        else:
            head_width = self.section.hidden_size // self.section.num_attention_heads
            positions = positions.unsqueeze(-2)  # alike in all heads
            rotary = compute_rotary_angles(positions, head_width, self.section.rope_theta)
        x_BTD = self.dropout(x_BTD)
        # Compiled in training only: validation and generation have too many shapes.
        compiles = self._computing.compiles and self.training
        if compiles and self._computing.compile_region == "model" and not last_only:
            if self._computing.cuda_graphs:
                # What the last replay left is free: OncePerStep has read its gradients, and the loss is no part of it.
                torch.compiler.cudagraph_mark_step_begin()
                run_region = _replay_blocks_and_norm.compiled
            else:
                run_region = _run_blocks_and_norm.compiled
            x_BTD = run_region(self, x_BTD, rotary, documents)
        else:
            run_block = _run_decoder_block.compiled if compiles else _run_decoder_block
            x_BTD = self._run_blocks(run_block, x_BTD, rotary, cache, documents)
            if last_only:
                x_BTD = x_BTD[:, -1:]  # prompt x vocabulary logits can be larger than all activations
            x_BTD = self.norm(x_BTD)
        if cache is not None:
            cache.length += ids_BT.size(1)
        head_VD = (self.lm_head or self.embed_tokens).weight  # tied: the embedding table once more
        if labels_BT is None:
            return F.linear(x_BTD, head_VD)
        options = self._computing
        return summed_cross_entropy(x_BTD.flatten(0, 1), head_VD, labels_BT.flatten(), options.loss, options.z_loss)

    def _run_blocks(
        self, run_block: Callable[..., Tensor], x_BTD: Tensor, rotary: RotaryAngles | None, cache: KVCache | None,
        documents: PackedDocuments | None,
    ) -> Tensor:  # fmt: skip
        """The residual stream after all blocks, of which gradient checkpointing recomputes some."""
        for i, block in enumerate(self._decoder_blocks()):
            if self.training and self._recompute.covers_block(i):
                x_BTD = self._recompute.run(run_block, block, x_BTD, rotary, cache, documents)
            else:
                x_BTD = run_block(block, x_BTD, rotary, cache, documents)
        return x_BTD

    def _embed_tokens(self, ids_BT: Tensor) -> Tensor:
        """[B, T, D] of ids [B, T]."""
        table = self.embed_tokens
        # On a CPU the few rows that were looked up are added to a tied table's gradient, not a table of zeros.
        table.sparse = self.lm_head is None and table.weight.device.type == "cpu"
        return table(ids_BT)

    def _decoder_blocks(self) -> Iterator[DecoderBlock]:
        for block in self.layers:
            assert isinstance(block, DecoderBlock)
            yield block

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """See LanguageModel."""
        weight = self.embed_tokens.weight
        return KVCache(self.section, batch, max_length, device=weight.device, dtype=weight.dtype)


@CompilableFunction
def _run_decoder_block(
    block: DecoderBlock, x_BTD: Tensor, rotary: RotaryAngles | None, cache: KVCache | None,
    documents: PackedDocuments | None,
) -> Tensor:  # fmt: skip
    """One block, [B, T, D] -> [B, T, D]. All blocks have the same code, so that it is compiled once."""
    return block(x_BTD, rotary, cache, documents)


@CompilableFunction
def _run_blocks_and_norm(
    decoder: Decoder, x_BTD: Tensor, rotary: RotaryAngles | None, documents: PackedDocuments | None
) -> Tensor:
    """All blocks and the last norm as one piece of code, in which the compiler sees from one block into the next."""
    return decoder.norm(decoder._run_blocks(_run_decoder_block, x_BTD, rotary, None, documents))


_replay_blocks_and_norm = CompilableFunction(_run_blocks_and_norm.function, cuda_graphs=True)


class _WithoutInit(TorchFunctionMode):
    """Inside, torch's layers are made without their initial values, which `init_weights` gives.

    On the meta device nothing would be drawn either, but for that torch imports its compiler, a second of work.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Any function of torch as it is, but for those of torch.nn.init."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if not args else args[0]
        return func(*args, **(kwargs or {}))


def build_decoder(section: ModelSection, computing: ComputeOptions, device: torch.device | str) -> Decoder:
    """See model.build.build_model."""
    with _WithoutInit(), torch.device("meta"):
        decoder = Decoder(section, computing)
    if torch.device(device).type != "meta":
        decoder.to_empty(device=device)
        decoder.init_weights()
    return decoder
