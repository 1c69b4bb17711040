"""A decoder as a Hugging Face folder: which class of transformers it is, and its config and tensors both ways.

Files are read and written as they are; nothing here needs transformers. Our parameter names are Llama's.
"""

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
from smoltrain.errors import Problem, UserError, format_value, problem_from_pydantic
from smoltrain.model.build import build_model

Tensors = dict[str, Tensor]

LLAMA, GPT2, NEOX, SMOLTRAIN = "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "SmoltrainForCausalLM"
MODEL_TYPES = {LLAMA: "llama", GPT2: "gpt2", NEOX: "gpt_neox", SMOLTRAIN: "smoltrain"}
SUPPORTED = ", ".join(MODEL_TYPES)
MODELING_FILE = Path(__file__).parents[1] / "export" / "modeling_smoltrain.py"  # the class OWN; exports carry a copy
WEIGHT_INDEX = "model.safetensors.index.json"  # names the shards of weights that are not one model.safetensors

# Our field -> their key in config.json, with their default if a folder may leave it out.
_SAME_KEYS = ("vocab_size", "initializer_range", "tie_word_embeddings")
_LLAMA_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_LLAMA_KEYS = (*_LLAMA_KEYS, "max_position_embeddings", "attention_dropout")
CONFIG_KEYS: dict[str, dict[str, str]] = {
    LLAMA: {
        k: k for k in (*_SAME_KEYS, *_LLAMA_KEYS, "num_key_value_heads", "rms_norm_eps", "attention_bias", "mlp_bias")
    },
    GPT2: {k: k for k in _SAME_KEYS}
    | {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    | {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon"}
    | {"dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"},
    NEOX: {k: k for k in (*_SAME_KEYS, *_LLAMA_KEYS, "attention_bias")}
    | {"rms_norm_eps": "layer_norm_eps", "dropout": "hidden_dropout"},
    SMOLTRAIN: {k: k for k in ModelSection.model_fields if k != "kind"},
}
CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    LLAMA: {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    GPT2: {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dropout": 0.1, "attention_dropout": 0.1},
    NEOX: {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": True, "dropout": 0.0},
    SMOLTRAIN: {},
}
# What each class is that ours must be told.
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
    GPT2: {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
    | {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
    | {f"self_attn.{p}_proj": "attn.c_attn" for p in "qkv"}
    | {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    NEOX: {"embed_tokens": "embed_in", "norm": "final_layer_norm"}
    | {name: name for name in ("input_layernorm", "post_attention_layernorm")}
    | {f"self_attn.{p}_proj": "attention.query_key_value" for p in "qkv"}
    | {"self_attn.o_proj": "attention.dense"}
    | {"mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"},
}
HF_PREFIXES = {LLAMA: "model.", GPT2: "transformer.", NEOX: "gpt_neox.", SMOLTRAIN: "model."}
OLD_BUFFERS = re.compile(
    r"\.(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)$"
)  # of older versions


def hf_class_name(section: ModelSection) -> str:
    """The class of transformers with this shape, or OWN. (Dropout on the residual stream acts in training only.)"""
    s = section
    shape, many = (s.norm, s.positions, s.mlp), s.num_key_value_heads == s.num_attention_heads
    if shape == ("rmsnorm", "rope", "swiglu"):
        return LLAMA
    if shape == ("layernorm", "learned", "gelu") and many and s.attention_bias and s.mlp_bias and s.tie_word_embeddings:
        return GPT2
    if shape == ("layernorm", "rope", "gelu") and many:
        return NEOX
    return SMOLTRAIN


def make_hf_config(section: ModelSection) -> dict[str, Any]:
    """config.json of the section's class, but for dtype and special tokens."""
    name = hf_class_name(section)
    about: dict[str, Any] = {"architectures": [name], "model_type": MODEL_TYPES[name]}
    if name == SMOLTRAIN:
        auto = {"AutoConfig": "SmoltrainConfig", "AutoModelForCausalLM": SMOLTRAIN}
        about["auto_map"] = {key: f"{MODELING_FILE.stem}.{value}" for key, value in auto.items()}
    about |= {theirs: getattr(section, ours) for ours, theirs in CONFIG_KEYS[name].items()}
    about |= {key: values[-1] for key, (_, values) in FIXED_OPTIONS[name].items()}
    if name == GPT2:
        about["embd_pdrop"] = section.dropout
    if name in (LLAMA, NEOX):
        about["rope_parameters"] = {"rope_type": "default", "rope_theta": section.rope_theta}
        # The words of transformers 4, which other engines still read.
        about["rope_theta" if name == LLAMA else "rotary_emb_base"] = section.rope_theta
    if name == NEOX:
        about["rope_parameters"]["partial_rotary_factor"] = about["rotary_pct"] = 1.0
    return about


def parse_hf_config(about: dict[str, Any], where: Path) -> ModelSection:
    """The decoder that a config.json (read from `where`) describes.

    Errors: UserError for a class or an option that the decoder does not have, and for values that make no decoder.
    """
    named = about.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else str(named)
    if name not in MODEL_TYPES:
        raise UserError(Problem("the folder's class is not supported", name, f"one of {SUPPORTED}", str(where)))
    values = CLASS_SHAPES[name] | {
        f: about.get(key, CONFIG_DEFAULTS[name].get(f)) for f, key in CONFIG_KEYS[name].items()
    }
    values = {key: value for key, value in values.items() if value is not None}
    heads, D = values.get("num_attention_heads"), values.get("hidden_size")
    if name != SMOLTRAIN:
        values.setdefault("num_key_value_heads", heads)
    if name == GPT2 and isinstance(D, int):
        values.setdefault("intermediate_size", 4 * D)
    if name in (LLAMA, NEOX):
        values["rope_theta"] = _parse_rope_theta(about, name, where)
    wrong = [
        Problem(f"{key} is not supported", format_value(saw), " or ".join(map(str, values)), str(where))
        for key, (default, values) in FIXED_OPTIONS[name].items()
        if (saw := about.get(key, default)) not in values
    ]
    if "quantization_config" in about:
        wrong.append(Problem("quantized weights are not supported", "quantization_config", "none", str(where)))
    try:
        section = ModelSection.model_validate(values)
    except ValidationError as error:
        keys = CONFIG_KEYS[name]
        wrong += [
            problem_from_pydantic(keys.get(str(e["loc"][0]), str(e["loc"][0])), e, str(where)) for e in error.errors()
        ]
        raise UserError(*wrong) from None
    E, odd = divmod(section.hidden_size, section.num_attention_heads)
    shared = section.num_attention_heads % section.num_key_value_heads
    if odd or shared or (section.positions == "rope" and E % 2) or (about.get("head_dim") or E) != E:
        K = section.num_key_value_heads
        saw = f"width {section.hidden_size}, {heads} heads, {K} key-value heads, head_dim {about.get('head_dim', E)}"
        wrong.append(Problem("the heads do not fit the width", saw, "heads that divide the width evenly", str(where)))
    if wrong:
        raise UserError(*wrong)
    return section


def _parse_rope_theta(about: dict[str, Any], name: str, where: Path) -> Any:
    """The base of plain rotary positions over the whole head; transformers 4 and 5 say it in different words."""
    rope: Any = about.get("rope_parameters") or about.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise UserError(Problem("rope scaling is not supported", format_value(kind), "'default'", str(where)))
    rope = rope if isinstance(rope, dict) else {}
    old_share, old_theta = (
        ("rotary_pct", "rotary_emb_base") if name == NEOX else ("partial_rotary_factor", "rope_theta")
    )
    share = rope.get("partial_rotary_factor", about.get(old_share, 0.25 if name == NEOX else 1.0))
    if share != 1:
        raise UserError(
            Problem(f"{old_share} is not supported", format_value(share), "1.0, the whole head", str(where))
        )
    return rope.get("rope_theta", about.get(old_theta, 10000.0))


def convert_to_hf_tensors(section: ModelSection, ours: Tensors) -> Tensors:
    """Our tensors under the names and in the layouts of `class_of(section)`; biases that only it has are zeros."""
    name = hf_class_name(section)
    # NeoX's MLP always has biases.
    full = section.model_copy(update={"mlp_bias": True}) if name == NEOX else section
    like = next(iter(ours.values()))
    zeros = {n: like.new_zeros(x.shape) for n, x in _meta_tensors(full).items() if n not in ours}
    return _fuse_tensors(name, full, ours | zeros)


def read_hf_decoder(folder: Path) -> tuple[ModelSection, Tensors]:
    """The decoder's shape and its tensors under our names, in the dtype of the files.

    Errors: UserError, one line each, for a class or option that is not supported, weights that are missing, corrupt
    or pickled, and tensors that are missing, unknown or of another shape than config.json says.
    """
    file = folder / "config.json"
    about = read_json_object(file)
    section = parse_hf_config(about, file)
    name = about["architectures"][0]
    theirs = _normalise_tensor_names(name, section, read_hf_weights(folder), folder)
    check_hf_tensors(
        {n: x.shape for n, x in _fuse_tensors(name, section, _meta_tensors(section)).items()}, theirs, folder
    )
    ours = _split_tensors(name, section, theirs)
    silent = [n for n in ours if n.endswith("bias") and ".mlp." in n and not ours[n].any()]
    if name == NEOX and len(silent) == 2 * section.num_hidden_layers:
        section = section.model_copy(update={"mlp_bias": False})  # NeoX cannot leave them out: all zeros are none
        ours = {n: x for n, x in ours.items() if n not in silent}
    return section, ours


def check_hf_tensors(want: dict[str, torch.Size], have: Tensors, where: Path) -> None:
    """Errors: UserError with up to five problems if names, shapes or dtypes of `have` are not what is wanted, or
    values no numbers."""
    wrong = [
        Problem("a tensor is missing", f"no {name}", str(tuple(want[name])), str(where)) for name in want - have.keys()
    ]
    for name, x in sorted(have.items()):
        if name not in want:
            wrong.append(Problem("a tensor is unknown", name, "the tensors of the config alone", str(where)))
        elif x.shape != want[name]:
            rows = "embed" in name or ".wte." in name or name.startswith("lm_head")
            what = f"{name} has another {'vocabulary' if rows and x.shape[1:] == want[name][1:] else 'shape'}"
            wrong.append(Problem(what, str(tuple(x.shape)), f"{tuple(want[name])} as the config says", str(where)))
        elif x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            wrong.append(Problem(f"{name} has another dtype", str(x.dtype), "float32, bfloat16 or float16", str(where)))
        elif not x.isfinite().all():
            wrong.append(Problem(f"{name} holds values that are no numbers", "nan or inf", "finite ones", str(where)))
    if wrong:
        raise UserError(*wrong[:5])


def read_safetensors_file(file: Path) -> Tensors:
    """All tensors of a file. Errors: UserError if it is missing or not whole."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
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
    return {name: x for shard in shards for name, x in read_safetensors_file(folder / shard).items()}


def _normalise_tensor_names(name: str, section: ModelSection, theirs: Tensors, folder: Path) -> Tensors:
    """What a file may say otherwise: no prefix, the old name of the head, buffers, the tied table twice."""
    prefix = HF_PREFIXES[name]
    kept = {n if n.startswith((prefix, "lm_head.", "embed_out.")) else prefix + n: x for n, x in theirs.items()}
    head_name = _hf_tensor_name(name, "lm_head.weight")
    heads = ("lm_head.weight", "embed_out.weight")
    kept = {head_name if n in heads else n: x for n, x in kept.items() if not OLD_BUFFERS.search(n)}
    if section.tie_word_embeddings and (head := kept.pop(head_name, None)) is not None:
        table = kept.get(_hf_tensor_name(name, "embed_tokens.weight"))
        if table is not None and not torch.equal(head, table):
            want = "equal ones, or tie_word_embeddings false"
            raise UserError(Problem("the tied head is not the embedding table", "two tensors", want, str(folder)))
    return kept


def _fuse_tensors(name: str, section: ModelSection, ours: Tensors) -> Tensors:
    """Our tensors in the layouts of the class `name`; each of its tensors is one of ours, or q, k and v together."""
    theirs: Tensors = {}
    for their_name, our_names in _group_tensor_names(name, section).items():
        parts = [ours[n] for n in our_names]
        if name == NEOX and len(parts) == 3:  # q, k and v of the first head, then of the second, ...
            x = torch.stack([p.unflatten(0, (section.num_attention_heads, -1)) for p in parts], 1).flatten(0, 2)
        else:
            x = torch.cat(parts) if len(parts) > 1 else parts[0]
        theirs[their_name] = (x.T if _is_conv1d_matrix(name, their_name) else x).contiguous()
    return theirs


def _split_tensors(name: str, section: ModelSection, theirs: Tensors) -> Tensors:
    """The inverse of `_fused`."""
    ours: Tensors = {}
    for their_name, our_names in _group_tensor_names(name, section).items():
        x = theirs[their_name].T if _is_conv1d_matrix(name, their_name) else theirs[their_name]
        if name == NEOX and len(our_names) == 3:
            parts = [p.flatten(0, 1) for p in x.unflatten(0, (section.num_attention_heads, 3, -1)).unbind(1)]
        else:
            parts = list(x.chunk(len(our_names)))
        ours |= {our_name: part.contiguous() for our_name, part in zip(our_names, parts, strict=True)}
    return ours


def _is_conv1d_matrix(name: str, theirs: str) -> bool:
    """Whether it is a matrix of GPT-2's Conv1D, which keeps it [in, out]."""
    return name == GPT2 and theirs.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _group_tensor_names(name: str, section: ModelSection) -> dict[str, list[str]]:
    """The names of the class, each with ours that its tensor is made of."""
    groups: dict[str, list[str]] = {}
    for ours in _meta_tensors(section):
        groups.setdefault(_hf_tensor_name(name, ours), []).append(ours)
    return groups


def _hf_tensor_name(name: str, ours: str) -> str:
    module, _, kind = ours.rpartition(".")
    if module == "lm_head":
        return "embed_out.weight" if name == NEOX else ours  # transformers 5 takes this name too, 4 takes no other
    if name not in HF_MODULES:
        return f"{HF_PREFIXES[name]}{ours}"
    if not module.startswith("layers."):
        return f"{HF_PREFIXES[name]}{HF_MODULES[name][module]}.{kind}"
    _, i, part = module.split(".", 2)
    return f"{HF_PREFIXES[name]}{'h' if name == GPT2 else 'layers'}.{i}.{HF_MODULES[name][part]}.{kind}"


def _meta_tensors(section: ModelSection) -> Tensors:
    """Our tensors without their numbers."""
    return build_model(section, device="meta").state_dict()


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds all of them exactly."""
    dtypes = [x.dtype for x in tensors]
    wide = dtypes[0]
    for dtype in dtypes[1:]:
        wide = torch.promote_types(wide, dtype)
    return wide
