"""A decoder as a Hugging Face folder: its tensors in the names and layouts of a class of transformers, both ways.

Our parameter names are Llama's. Below, `name` is the name of a class of transformers, "ours" are tensors in our names
and layouts, "theirs" in those of the class. config.json: hf_config.py; the files of the weights: hf_weights.py.
"""

import re
from pathlib import Path

import torch

from smoltrain.config.schema import ModelSection
from smoltrain.data.tokenizers.companions import read_json_object
from smoltrain.errors import Problem, UserError
from smoltrain.model.build import build_model
from smoltrain.model.hf_config import GPT2, LLAMA, NEOX, SMOLTRAIN, hf_class_name, parse_hf_config
from smoltrain.model.hf_weights import Tensors, check_hf_tensors, read_hf_weights

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
