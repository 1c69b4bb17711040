"""The parts of a decoder block: causal self-attention with RoPE and a KV cache, SwiGLU or GELU, RMSNorm or LayerNorm.

Attributes of the modules are the names of their weights in checkpoints and exports: those of transformers' Llama.
export/modeling_smoltrain.py has the same layers once more, as it is copied into exports; a test holds them equal.

Legend: B batch, T tokens, S keys (T plus what the cache holds), D width of the residual stream, H query heads,
K key-value heads, E width per head (D / H).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoltrain.config.schema import ModelSection
from smoltrain.kernels.attention import AttentionKernel, PackedDocuments, causal_attention
from smoltrain.kernels.cpu_dropout import FastDropout
from smoltrain.kernels.joint_linear import joint_linear

RotaryAngles = tuple[Tensor, Tensor]


def make_norm(model: ModelSection) -> nn.Module:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over D; torch computes both in fp32 inside."""
    cls = nn.RMSNorm if model.norm == "rmsnorm" else nn.LayerNorm
    return cls(model.hidden_size, eps=model.rms_norm_eps)


def compute_rotary_angles(positions: Tensor, head_width: int, theta: float) -> RotaryAngles:
    """Cosines and sines of rotary positions (RoPE, Su et al. 2021), each [*positions, E/2] in fp32.

    Computed anew in each forward, once for all blocks, and kept in no buffer: a model cast to bf16 would cast the
    buffer too, and bf16 cannot tell position 257 from 256.
    """
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def apply_rotary(x_BHTE: Tensor, rotary: RotaryAngles) -> Tensor:
    """Rotate each pair (i, i + E/2) of a head by its angle, in fp32: the half-split layout of GPT-NeoX and Llama."""
    cos, sin = rotary
    x, y = x_BHTE.chunk(2, dim=-1)
    return torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1).type_as(x_BHTE)


class KVCache:
    """The KV cache: keys and values of the tokens so far in every block, preallocated; `length` counts the tokens."""

    def __init__(
        self, model: ModelSection, batch: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        E = model.hidden_size // model.num_attention_heads
        shape = (model.num_hidden_layers, 2, batch, model.num_key_value_heads, max_length, E)
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of one block behind the old; returns all of them, [B, K, S, E] each."""
        S = self.length + k_BKTE.size(2)
        keys, values = self.store[layer, :, :, :, :S]
        keys[:, :, self.length :] = k_BKTE
        values[:, :, self.length :] = v_BKTE
        return keys, values


class SelfAttention(nn.Module):
    """Causal self-attention with H query heads over K key-value heads: [B, T, D] -> [B, T, D]."""

    def __init__(self, model: ModelSection, kernel: AttentionKernel, layer: int, *, fused: bool = False) -> None:
        super().__init__()
        D = model.hidden_size
        bias = model.attention_bias
        self.head_width = D // model.num_attention_heads
        self.q_proj = nn.Linear(D, D, bias=bias)
        self.k_proj = nn.Linear(D, model.num_key_value_heads * self.head_width, bias=bias)
        self.v_proj = nn.Linear(D, model.num_key_value_heads * self.head_width, bias=bias)
        self.o_proj = nn.Linear(D, D, bias=bias)
        self.dropout = model.attention_dropout
        self.kernel = kernel
        self.layer = layer
        self.joint_layers = ((self.q_proj, self.k_proj, self.v_proj),) if fused else ()  # as one product

    def forward(
        self, x_BTD: Tensor, rotary: RotaryAngles | None, cache: KVCache | None, documents: PackedDocuments | None
    ) -> Tensor:
        """Mix the tokens; with a cache, attend to its tokens too and add these to it."""
        if self.joint_layers:
            projected = joint_linear(x_BTD, self.joint_layers[0])
        else:
            projected = (self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD))
        q_BHTE, k_BKSE, v_BKSE = (self._split_heads(x) for x in projected)
        if rotary is not None:
            q_BHTE = apply_rotary(q_BHTE, rotary)
            k_BKSE = apply_rotary(k_BKSE, rotary)
        if cache is not None:
            k_BKSE, v_BKSE = cache.extend(self.layer, k_BKSE, v_BKSE)
        dropout = self.dropout if self.training else 0.0
        y_BHTE = causal_attention(q_BHTE, k_BKSE, v_BKSE, self.kernel, dropout=dropout, documents=documents)
        return self.o_proj(y_BHTE.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * E] -> [B, heads, T, E]."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": tanh_gelu}  # by model.mlp; swiglu, which has a gate, is the other kind


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), or two layers with an activation between them: D -> D per token."""

    def __init__(self, model: ModelSection, *, fused: bool = False) -> None:
        super().__init__()
        D = model.hidden_size
        inner = model.intermediate_size
        bias = model.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias) if model.mlp == "swiglu" else None
        self.kind = model.mlp
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)
        gate = self.gate_proj
        self.joint_layers = ((gate, self.up_proj),) if fused and gate is not None else ()  # as one product

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each token on its own."""
        if self.gate_proj is None:
            return self.down_proj(ACTIVATIONS[self.kind](self.up_proj(x_BTD)))
        if self.joint_layers:
            gate, up = joint_linear(x_BTD, self.joint_layers[0])
        else:
            gate = self.gate_proj(x_BTD)
            up = self.up_proj(x_BTD)
        return self.down_proj(F.silu(gate) * up)


class DecoderBlock(nn.Module):
    """One pre-norm block (Xiong et al. 2020): attention, then MLP, each added to the residual stream [B, T, D]."""

    def __init__(self, model: ModelSection, kernel: AttentionKernel, layer: int, *, fused: bool = False) -> None:
        super().__init__()
        self.input_layernorm = make_norm(model)
        self.self_attn = SelfAttention(model, kernel, layer, fused=fused)
        self.post_attention_layernorm = make_norm(model)
        self.mlp = FeedForward(model, fused=fused)
        self.dropout = FastDropout(model.dropout)

    def forward(
        self, x_BTD: Tensor, rotary: RotaryAngles | None, cache: KVCache | None, documents: PackedDocuments | None
    ) -> Tensor:
        """The stream after both branches."""
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), rotary, cache, documents))
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))
