"""A decoder as a Hugging Face folder: which class of transformers it is, and its config and tensors both ways.

Files are read and written as they are; nothing here needs transformers. Our parameter names are Llama's. Below, `name`
is the name of a class of transformers, "ours" are tensors in our names and layouts, "theirs" in those of the class.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smoltrain.config.schema import ModelSection
from smoltrain.data.tokenizers.companions import read_json_object
from smoltrain.errors import Problem, UserError, exception_message, format_value, problem_from_pydantic
from smoltrain.model.build import build_model

Tensors = dict[str, Tensor]

LLAMA, GPT2, NEOX, SMOLTRAIN = "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "SmoltrainForCausalLM"
MODEL_TYPES = {LLAMA: "llama", GPT2: "gpt2", NEOX: "gpt_neox", SMOLTRAIN: "smoltrain"}
SUPPORTED = ", ".join(MODEL_TYPES)
MODELING_FILE = Path(__file__).parents[1] / "export" / "modeling_smoltrain.py"  # SMOLTRAIN; exports carry a copy
WEIGHT_INDEX = "model.safetensors.index.json"  # names the shards of weights that are not one model.safetensors


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
# Our modules -> theirs, outside and inside of a block. Several of ours with one of theirs are fused there.
HF_MODULES: dict[str, dict[str, str]] = {
    GPT2: {
        "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f",
        "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn", "self_attn.v_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    },
    NEOX: {
        "embed_tokens": "embed_in", "norm": "final_layer_norm",
        "input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm",
        "self_attn.q_proj": "attention.query_key_value", "self_attn.k_proj": "attention.query_key_value",
        "self_attn.v_proj": "attention.query_key_value", "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
    },
}  # fmt: skip
HF_PREFIXES = {LLAMA: "model.", GPT2: "transformer.", NEOX: "gpt_neox.", SMOLTRAIN: "model."}
# Of older versions of transformers.
OLD_BUFFERS = re.compile(r"\.(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)$")
OLD_HEADS = ("lm_head.weight", "embed_out.weight")


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


def convert_to_hf_tensors(section: ModelSection, ours: Tensors) -> Tensors:
    """Our tensors as those of `hf_class_name(section)`; biases that only the class has are zeros."""
    name = hf_class_name(section)
    # NeoX's MLP always has biases.
    full_section = section.model_copy(update={"mlp_bias": True}) if name == NEOX else section
    like = next(iter(ours.values()))
    zeros = {n: like.new_zeros(x.shape) for n, x in _meta_tensors(full_section).items() if n not in ours}
    return _fuse_tensors(name, full_section, ours | zeros)


def read_hf_decoder(folder: Path) -> tuple[ModelSection, Tensors]:
    """The decoder's shape and its tensors under our names, in the dtype of the files.

    Errors: UserError, one line each, for a class or option that is not supported, weights that are missing, corrupt
    or pickled, and tensors that are missing, unknown or of another shape than config.json says.
    """
    file = folder / "config.json"
    config = read_json_object(file)
    section = parse_hf_config(config, file)
    name = config["architectures"][0]
    theirs = _normalise_tensor_names(name, section, read_hf_weights(folder), folder)
    wanted = _fuse_tensors(name, section, _meta_tensors(section))
    check_hf_tensors({their_name: x.shape for their_name, x in wanted.items()}, theirs, folder)
    ours = _split_tensors(name, section, theirs)
    zero_biases = [n for n, x in ours.items() if n.endswith("bias") and ".mlp." in n and not x.any()]
    if name == NEOX and len(zero_biases) == 2 * section.num_hidden_layers:
        # NeoX cannot leave the MLP's biases out: zeros in all of them are none.
        section = section.model_copy(update={"mlp_bias": False})
        ours = {n: x for n, x in ours.items() if n not in zero_biases}
    return section, ours


def check_hf_tensors(want: dict[str, torch.Size], have: Tensors, where: Path) -> None:
    """Errors: UserError with up to five problems: a tensor that is missing or unknown, its shape, dtype, no numbers."""
    problems: list[Problem] = []
    for name in sorted(want.keys() - have.keys()):
        problems.append(Problem("a tensor is missing", f"no {name}", str(tuple(want[name])), str(where)))
    for name, x in sorted(have.items()):
        if name not in want:
            problems.append(Problem("a tensor is unknown", name, "the tensors of the config alone", str(where)))
        elif x.shape != want[name]:
            is_table = "embed" in name or ".wte." in name or name.startswith("lm_head")
            kind = "vocabulary" if is_table and x.shape[1:] == want[name][1:] else "shape"
            wanted = f"{tuple(want[name])} as the config says"
            problems.append(Problem(f"{name} has another {kind}", str(tuple(x.shape)), wanted, str(where)))
        elif x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            wanted = "float32, bfloat16 or float16"
            problems.append(Problem(f"{name} has another dtype", str(x.dtype), wanted, str(where)))
        elif not x.isfinite().all():
            problems.append(
                Problem(f"{name} holds values that are no numbers", "nan or inf", "finite ones", str(where))
            )
    if problems:
        raise UserError(*problems[:5])


def read_safetensors_file(file: Path) -> Tensors:
    """All tensors of a file. Errors: UserError if it is missing or not whole."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = exception_message(error)
        raise UserError(Problem("the weights cannot be read", reason, "a whole .safetensors file", str(file))) from None


def read_hf_weights(folder: Path) -> Tensors:
    """The tensors of model.safetensors, or of all shards that the index names."""
    if (folder / "model.safetensors").is_file():
        return read_safetensors_file(folder / "model.safetensors")
    if not (folder / WEIGHT_INDEX).is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        saw = f"{pickles[0]}, a pickle, which could run code" if pickles else "neither of the two"
        raise UserError(Problem("the folder has no weights", saw, f"model.safetensors or {WEIGHT_INDEX}", str(folder)))
    names = read_json_object(folder / WEIGHT_INDEX).get("weight_map")
    shards = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not shards or any(Path(shard).name != shard for shard in shards):
        saw, want = format_value(shards), "a weight_map that names files of the folder"
        raise UserError(Problem("the index of the weights is damaged", saw, want, str(folder / WEIGHT_INDEX)))
    tensors: Tensors = {}
    for shard in shards:
        tensors |= read_safetensors_file(folder / shard)
    return tensors


def _normalise_tensor_names(name: str, section: ModelSection, theirs: Tensors, folder: Path) -> Tensors:
    """Their tensors as files of today name them: add the prefix, rename an old head, drop buffers and a tied head.

    Errors: UserError for a head that should be the embedding table and is not.
    """
    prefix = HF_PREFIXES[name]
    head_name = _hf_tensor_name(name, "lm_head.weight")
    tensors: Tensors = {}
    for old_name, x in theirs.items():
        full_name = old_name if old_name.startswith((prefix, "lm_head.", "embed_out.")) else prefix + old_name
        if not OLD_BUFFERS.search(full_name):
            tensors[head_name if full_name in OLD_HEADS else full_name] = x
    if section.tie_word_embeddings:
        head = tensors.pop(head_name, None)
        table = tensors.get(_hf_tensor_name(name, "embed_tokens.weight"))
        if head is not None and table is not None and not torch.equal(head, table):
            want = "equal ones, or tie_word_embeddings false"
            raise UserError(Problem("the tied head is not the embedding table", "two tensors", want, str(folder)))
    return tensors


def _fuse_tensors(name: str, section: ModelSection, ours: Tensors) -> Tensors:
    """Our tensors in the layouts of the class `name`; each of its tensors is one of ours, or q, k and v together."""
    theirs: Tensors = {}
    for their_name, our_names in _group_tensor_names(name, section).items():
        parts = [ours[n] for n in our_names]
        if name == NEOX and len(parts) == 3:  # q, k and v of the first head, then of the second, ...
            x = torch.stack([p.unflatten(0, (section.num_attention_heads, -1)) for p in parts], 1).flatten(0, 2)
        else:
            x = torch.cat(parts) if len(parts) > 1 else parts[0]
        if _is_conv1d_matrix(name, their_name):
            x = x.T
        theirs[their_name] = x.contiguous()
    return theirs


def _split_tensors(name: str, section: ModelSection, theirs: Tensors) -> Tensors:
    """The inverse of `_fuse_tensors`."""
    ours: Tensors = {}
    for their_name, our_names in _group_tensor_names(name, section).items():
        x = theirs[their_name]
        if _is_conv1d_matrix(name, their_name):
            x = x.T
        if name == NEOX and len(our_names) == 3:
            parts = [p.flatten(0, 1) for p in x.unflatten(0, (section.num_attention_heads, 3, -1)).unbind(1)]
        else:
            parts = list(x.chunk(len(our_names)))
        ours |= {our_name: part.contiguous() for our_name, part in zip(our_names, parts, strict=True)}
    return ours


def _is_conv1d_matrix(name: str, their_name: str) -> bool:
    """Whether it is a matrix of GPT-2's Conv1D, which keeps it [in, out] where nn.Linear has [out, in]."""
    return name == GPT2 and their_name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _group_tensor_names(name: str, section: ModelSection) -> dict[str, list[str]]:
    """The names of the class, each with those of ours that its tensor is made of."""
    groups: dict[str, list[str]] = {}
    for our_name in _meta_tensors(section):
        groups.setdefault(_hf_tensor_name(name, our_name), []).append(our_name)
    return groups


def _hf_tensor_name(name: str, our_name: str) -> str:
    module, _, kind = our_name.rpartition(".")  # kind: weight or bias
    prefix = HF_PREFIXES[name]
    if module == "lm_head":
        return "embed_out.weight" if name == NEOX else our_name  # transformers 5 takes this name too, 4 takes no other
    if name not in HF_MODULES:
        return f"{prefix}{our_name}"
    if not module.startswith("layers."):
        return f"{prefix}{HF_MODULES[name][module]}.{kind}"
    _, layer, part = module.split(".", 2)
    blocks = "h" if name == GPT2 else "layers"
    return f"{prefix}{blocks}.{layer}.{HF_MODULES[name][part]}.{kind}"


def _meta_tensors(section: ModelSection) -> Tensors:
    """Our tensors on the device 'meta': names, shapes and dtypes, no numbers."""
    return build_model(section, device="meta").state_dict()


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds all of them exactly."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))
