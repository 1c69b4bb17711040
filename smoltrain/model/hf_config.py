"""A decoder's shape as a config.json of transformers, both ways: which class it is, its keys, what it cannot be.

Files are read and written as they are; nothing here needs transformers. Below, `name` is the name of its class.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltrain.config.schema import ModelSection
from smoltrain.errors import Problem, UserError, format_value, problem_from_pydantic

LLAMA = "LlamaForCausalLM"
GPT2 = "GPT2LMHeadModel"
NEOX = "GPTNeoXForCausalLM"
SMOLTRAIN = "SmoltrainForCausalLM"
MODEL_TYPES = {LLAMA: "llama", GPT2: "gpt2", NEOX: "gpt_neox", SMOLTRAIN: "smoltrain"}
SUPPORTED = ", ".join(MODEL_TYPES)
MODELING_FILE = Path(__file__).parents[1] / "export" / "modeling_smoltrain.py"  # SMOLTRAIN; exports carry a copy


def _same_names(*fields: str) -> dict[str, str]:
    return {field: field for field in fields}


_SAME_IN_ALL = _same_names("vocab_size", "initializer_range", "tie_word_embeddings")
_SAME_IN_BOTH = _same_names(
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "attention_dropout",
)  # fmt: skip
# Our field -> their key in config.json.
CONFIG_KEYS: dict[str, dict[str, str]] = {
    LLAMA: {
        **_SAME_IN_ALL, **_SAME_IN_BOTH,
        **_same_names("num_key_value_heads", "rms_norm_eps", "attention_bias", "mlp_bias"),
    },
    GPT2: {
        **_SAME_IN_ALL, "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop", "attention_dropout": "attn_pdrop",
    },
    NEOX: {
        **_SAME_IN_ALL, **_SAME_IN_BOTH, "attention_bias": "attention_bias", "rms_norm_eps": "layer_norm_eps",
        "dropout": "hidden_dropout",
    },
    SMOLTRAIN: _same_names(*(field for field in ModelSection.model_fields if field != "kind")),
}  # fmt: skip
# Their defaults of these, if a folder may leave them out.
CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    LLAMA: {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    GPT2: {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dropout": 0.1, "attention_dropout": 0.1},
    NEOX: {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": True, "dropout": 0.0},
    SMOLTRAIN: {},
}
# What each class is by itself, and our decoder must be told.
CLASS_SHAPES: dict[str, dict[str, Any]] = {
    LLAMA: {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu"},
    GPT2: {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "attention_bias": True, "mlp_bias": True},
    NEOX: {"norm": "layernorm", "positions": "rope", "mlp": "gelu", "mlp_bias": True},
    SMOLTRAIN: {},
}
# Options that ours lacks: their key -> (their default, the values that ask for nothing else). We write the last one.
TANH_GELU = ("gelu_pytorch_tanh", "gelu_fast", "gelu_new")
FIXED_OPTIONS: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    LLAMA: {"hidden_act": ("silu", ("swish", "silu"))},
    GPT2: {
        "activation_function": ("gelu_new", TANH_GELU),
        "scale_attn_weights": (True, (True,)),
        "scale_attn_by_inverse_layer_idx": (False, (False,)),
        "add_cross_attention": (False, (False,)),
    },
    NEOX: {"hidden_act": ("gelu", TANH_GELU), "use_parallel_residual": (True, (False,))},
    SMOLTRAIN: {},
}


def hf_class_name(section: ModelSection) -> str:
    """The class of transformers with this shape, or SMOLTRAIN. Dropout may differ: it acts in training only."""
    shape = (section.norm, section.positions, section.mlp)
    multi_head = section.num_key_value_heads == section.num_attention_heads  # no key-value head is shared
    all_biases = section.attention_bias and section.mlp_bias
    if shape == ("rmsnorm", "rope", "swiglu"):
        return LLAMA
    if shape == ("layernorm", "learned", "gelu") and multi_head and all_biases and section.tie_word_embeddings:
        return GPT2
    if shape == ("layernorm", "rope", "gelu") and multi_head:
        return NEOX
    return SMOLTRAIN


def make_hf_config(section: ModelSection) -> dict[str, Any]:
    """config.json of the section's class, but for dtype and special tokens."""
    name = hf_class_name(section)
    config: dict[str, Any] = {"architectures": [name], "model_type": MODEL_TYPES[name]}
    if name == SMOLTRAIN:
        module = MODELING_FILE.stem
        config["auto_map"] = {
            "AutoConfig": f"{module}.SmoltrainConfig",
            "AutoModelForCausalLM": f"{module}.{SMOLTRAIN}",
        }
    config |= {theirs: getattr(section, ours) for ours, theirs in CONFIG_KEYS[name].items()}
    config |= {key: values[-1] for key, (_, values) in FIXED_OPTIONS[name].items()}
    if name == GPT2:
        config["embd_pdrop"] = section.dropout
        config["n_ctx"] = section.max_position_embeddings  # GPT-2's word of before, which llama.cpp still reads
    if name in (LLAMA, NEOX):
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": section.rope_theta}
        # The words of transformers 4, which other engines still read.
        config["rope_theta" if name == LLAMA else "rotary_emb_base"] = section.rope_theta
    if name == NEOX:
        config["rope_parameters"]["partial_rotary_factor"] = config["rotary_pct"] = 1.0
    return config


def parse_hf_config(config: dict[str, Any], where: Path) -> ModelSection:
    """The decoder that a config.json (read from `where`) describes.

    Errors: UserError for a class or an option that the decoder does not have, and for values that make no decoder.
    """
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else str(classes)
    if name not in MODEL_TYPES:
        raise UserError(Problem("the folder's class is not supported", name, f"one of {SUPPORTED}", str(where)))
    problems: list[Problem] = []
    section_values = _collect_section_values(config, name, where)
    for key, (default, allowed) in FIXED_OPTIONS[name].items():
        value = config.get(key, default)
        if value not in allowed:
            want = " or ".join(map(str, allowed))
            problems.append(Problem(f"{key} is not supported", format_value(value), want, str(where)))
    if "quantization_config" in config:
        problems.append(Problem("quantized weights are not supported", "quantization_config", "none", str(where)))
    try:
        section = ModelSection.model_validate(section_values)
    except ValidationError as error:
        for detail in error.errors():
            field = str(detail["loc"][0])
            problems.append(problem_from_pydantic(CONFIG_KEYS[name].get(field, field), detail, str(where)))
        raise UserError(*problems) from None
    if not _heads_fit(section, config.get("head_dim")):
        D, H, K = section.hidden_size, section.num_attention_heads, section.num_key_value_heads
        saw = f"width {D}, {H} heads, {K} key-value heads, head_dim {config.get('head_dim', D // H)}"
        want = "heads that divide the width evenly"
        problems.append(Problem("the heads do not fit the width", saw, want, str(where)))
    if problems:
        raise UserError(*problems)
    return section


def _collect_section_values(config: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    """The fields of a ModelSection, unchecked. What neither the config nor its class says is left out."""
    values = dict(CLASS_SHAPES[name])
    for field, key in CONFIG_KEYS[name].items():
        value = config.get(key, CONFIG_DEFAULTS[name].get(field))
        if value is None:
            values.pop(field, None)
        else:
            values[field] = value
    if name != SMOLTRAIN and "num_attention_heads" in values:
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if name == GPT2 and isinstance(values.get("hidden_size"), int):
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
    if name in (LLAMA, NEOX):
        values["rope_theta"] = _parse_rope_theta(config, name, where)
    return values


def _heads_fit(section: ModelSection, head_dim: Any) -> bool:
    """Whether the width divides into heads, their number into key-value heads, and RoPE finds pairs in a head."""
    E, rest = divmod(section.hidden_size, section.num_attention_heads)
    if rest or section.num_attention_heads % section.num_key_value_heads:
        return False
    if section.positions == "rope" and E % 2:
        return False
    return not head_dim or head_dim == E


def _parse_rope_theta(config: dict[str, Any], name: str, where: Path) -> Any:
    """The base of plain rotary positions over the whole head; transformers 4 and 5 say it in different words."""
    rope: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise UserError(Problem("rope scaling is not supported", format_value(kind), "'default'", str(where)))
    rope = rope if isinstance(rope, dict) else {}
    if name == NEOX:
        old_share, default_share, old_theta = "rotary_pct", 0.25, "rotary_emb_base"
    else:
        old_share, default_share, old_theta = "partial_rotary_factor", 1.0, "rope_theta"
    share = rope.get("partial_rotary_factor", config.get(old_share, default_share))
    if share != 1:
        what = f"{old_share} is not supported"
        raise UserError(Problem(what, format_value(share), "1.0, the whole head", str(where)))
    return rope.get("rope_theta", config.get(old_theta, 10000.0))
