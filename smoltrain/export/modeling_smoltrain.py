"""smoltrain's decoder as a class of transformers, for shapes that none of transformers' own classes has.

This file is copied into exports, so it needs torch and transformers (4.46 or newer) and nothing else, and has layers
of its own that repeat those of smoltrain. Parameter names are Llama's.
    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Legend: B batch, T tokens, S keys (T and what the cache holds), D width of the residual stream, H query heads,
K key-value heads, E width per head (D / H), V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

Rotary = tuple[Tensor, Tensor]
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class SmoltrainConfig(PretrainedConfig):
    """The decoder's shape; the names are those of the `model` section of a recipe."""

    model_type = "smoltrain"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 # transformers' own way to say it

    def __init__(
        self,
        vocab_size: int = 49152,
        hidden_size: int = 576,
        num_hidden_layers: int = 30,
        num_attention_heads: int = 9,
        num_key_value_heads: int = 9,
        intermediate_size: int = 1536,
        max_position_embeddings: int = 2048,
        norm: str = "rmsnorm",
        rms_norm_eps: float = 1e-5,
        positions: str = "rope",
        rope_theta: float = 10000.0,
        mlp: str = "swiglu",
        attention_bias: bool = False,
        mlp_bias: bool = False,
        tie_word_embeddings: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.intermediate_size, self.max_position_embeddings = intermediate_size, max_position_embeddings
        self.norm, self.rms_norm_eps = norm, rms_norm_eps  # rmsnorm or layernorm
        self.positions, self.rope_theta = positions, rope_theta  # rope or learned
        self.mlp = mlp  # swiglu, or gelu in its tanh form
        self.attention_bias, self.mlp_bias = attention_bias, mlp_bias
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.initializer_range, self.use_cache = initializer_range, use_cache
        super().__init__(**others)
        self.tie_word_embeddings = tie_word_embeddings


def make_norm_layer(config: SmoltrainConfig) -> nn.Module:
    """RMSNorm or LayerNorm over D, computed in fp32 inside."""
    cls = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return cls(config.hidden_size, eps=config.rms_norm_eps)


def rotary_cos_sin(positions_BT: Tensor, config: SmoltrainConfig) -> Rotary:
    """Cosines and sines of rotary positions (Su et al. 2021), each [B, 1, T, E/2] in fp32."""
    E = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, E, 2, device=positions_BT.device, dtype=torch.float32) / E
    angles = positions_BT[:, None, :, None].float() * (1.0 / config.rope_theta**exponents)
    return angles.cos(), angles.sin()


def rotate_pairs(x_BHTE: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each pair (i, i + E/2) of a head by its angle, in fp32."""
    cos, sin = rotary
    x, y = x_BHTE.chunk(2, dim=-1)
    return torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1).type_as(x_BHTE)


def causal_mask(num_new: int, num_past: int, attention_mask_BS: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees, bool [B or 1, 1, T, S]: those up to itself, but for padding (0 in the mask)."""
    S = num_past + num_new
    seen_TS = torch.ones(num_new, S, dtype=torch.bool, device=device).tril(num_past)
    if attention_mask_BS is None:
        return seen_TS[None, None]
    # A padding token that saw nothing would be nan, and through its keys so would all others: it sees itself.
    itself_TS = torch.eye(S, dtype=torch.bool, device=device)[num_past:]
    return seen_TS & attention_mask_BS[:, None, None, :S].bool() | itself_TS


class SmoltrainAttention(nn.Module):
    """Causal self-attention with H query heads over K key-value heads: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: SmoltrainConfig, layer: int) -> None:
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.head_width = D // config.num_attention_heads
        self.q_proj = nn.Linear(D, D, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * self.head_width, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * self.head_width, bias=bias)
        self.o_proj = nn.Linear(D, D, bias=bias)
        self.dropout, self.layer = config.attention_dropout, layer

    def forward(self, x_BTD: Tensor, seen_BTS: Tensor, rotary: Rotary | None, cache: Any) -> Tensor:
        """Mix the tokens; with a cache, attend to its tokens too and add these to it."""
        q_BHTE, k_BKSE, v_BKSE = (
            projection(x_BTD).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q_BHTE, k_BKSE = rotate_pairs(q_BHTE, rotary), rotate_pairs(k_BKSE, rotary)
        if cache is not None:
            k_BKSE, v_BKSE = cache.update(k_BKSE, v_BKSE, self.layer)
        dropout = self.dropout if self.training else 0.0
        shared = q_BHTE.size(1) != k_BKSE.size(1)
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=seen_BTS, dropout_p=dropout, enable_gqa=shared
        )
        return self.o_proj(y_BHTE.transpose(1, 2).flatten(2))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of an MLP without a gate
    "gelu": partial(F.gelu, approximate="tanh")
}


class SmoltrainMLP(nn.Module):
    """SwiGLU (Shazeer 2020), or two layers with an activation between them: D -> D per token."""

    def __init__(self, config: SmoltrainConfig) -> None:
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias) if config.mlp == "swiglu" else None
        self.kind = config.mlp
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each token on its own."""
        up = self.up_proj(x_BTD)
        if self.gate_proj is None:
            return self.down_proj(ACTIVATIONS[self.kind](up))
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * up)


class SmoltrainBlock(nn.Module):
    """One pre-norm block: attention, then MLP, each added to the residual stream [B, T, D]."""

    def __init__(self, config: SmoltrainConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm_layer(config)
        self.self_attn = SmoltrainAttention(config, layer)
        self.post_attention_layernorm = make_norm_layer(config)
        self.mlp = SmoltrainMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, seen_BTS: Tensor, rotary: Rotary | None, cache: Any) -> Tensor:
        """The stream after both branches."""
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), seen_BTS, rotary, cache))
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))


class SmoltrainPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model."""

    config: SmoltrainConfig
    config_class = SmoltrainConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["SmoltrainBlock"]  # noqa: RUF012


class SmoltrainModel(SmoltrainPreTrainedModel):
    """The decoder up to its last norm."""

    def __init__(self, config: SmoltrainConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, D) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SmoltrainBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm_layer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another table."""
        self.embed_tokens = value

    def forward(self, x_BTD: Tensor, attention_mask: Tensor | None, positions_BT: Tensor | None, cache: Any) -> Tensor:
        """The hidden states [B, T, D] of embedded tokens; with a cache they continue the tokens in it."""
        T, past = x_BTD.size(1), int(cache.get_seq_length()) if cache is not None else 0
        if positions_BT is None:
            positions_BT = torch.arange(past, past + T, device=x_BTD.device)[None]
        rotary = rotary_cos_sin(positions_BT, self.config) if self.embed_positions is None else None
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(positions_BT)
        seen_BTS = causal_mask(T, past, attention_mask, x_BTD.device)
        x_BTD = self.dropout(x_BTD)
        for block in self.layers:
            x_BTD = block(x_BTD, seen_BTS, rotary, cache)
        return self.norm(x_BTD)


class SmoltrainForCausalLM(SmoltrainPreTrainedModel, GenerationMixin):
    """The language model: token ids in, logits out, and the mean loss if there are labels."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SmoltrainConfig) -> None:
        super().__init__(config)
        self.model = SmoltrainModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Another head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of ids [B, T] (or of the last `logits_to_keep` ones), as transformers' own classes do it.

        `labels` are the ids themselves: the loss shifts them, and leaves out those that are -100. `past_key_values` was
        the name of the `cache` before transformers 5.24, whose `generate` passes it by its new one.
        """
        x_BTD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for name, value in others.items():
            if isinstance(value, Cache):  # else it would be left out, and a text go on from its last token alone
                raise TypeError(f"this version of transformers passes its cache as {name!r}, not as 'cache'")
        if cache is None:
            cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        x_BTD = self.model(x_BTD, attention_mask, position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(x_BTD[:, kept])  # -0 keeps all
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **others)
        past = {CACHE_FIELD: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **past)
