"""Any causal language model of `transformers`, with fresh weights, behind the same interface as our own decoder.

transformers is imported when the first such model is built. Nothing is downloaded and no remote code is run: a model
is a class of the installed package and the keys of a recipe.

Legend: B batch, T tokens, V vocabulary.
"""

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor

from smoltrain.config.schema import MAX_LAYERS, TransformersSection
from smoltrain.errors import Problem, UserError, suggest_choice
from smoltrain.kernels.attention import AttentionKernel, document_starts
from smoltrain.kernels.loss import summed_cross_entropy_of_logits
from smoltrain.model.interface import ComputeOptions, LanguageModel

OLD_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # older names, which transformers still reads
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SET_ELSEWHERE = {
    "dtype": "engine.precision",
    "torch_dtype": "engine.precision",
    "attn_implementation": "engine.attention",
}
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")


class HuggingFaceCache:
    """The tokens so far, in the cache that the class itself makes; for a class without one, their ids."""

    def __init__(self) -> None:
        self.past: Any = None
        self.ids_BT: Tensor | None = None
        self.length = 0


class HuggingFaceModel(LanguageModel):
    """`inner` is transformers' own model: the state dict's keys are 'inner.' and its own. Make it with `fresh`."""

    def __init__(self, section: TransformersSection, inner: Any, z_loss: float = 0.0) -> None:
        super().__init__()
        self._section, self._z_loss = section, z_loss
        self.inner = inner
        self._takes = set(inspect.signature(inner.forward).parameters)

    @property
    def section(self) -> TransformersSection:
        """The class, and what was said of its shape."""
        return self._section

    def forward(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor | None = None,
        cache: HuggingFaceCache | None = None,
        *,
        last_only: bool = False,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """See LanguageModel. The loss is the cross entropy alone, also where a class would add a router's.

        An attention mask is never passed, and a cache only by the caller: rows are full, so there is nothing to mask,
        and either of the two switches off, without a word, the masks that transformers makes between packed documents.
        """
        assert cache is None or positions_BT is None, "a cache continues one text, not packed documents"
        T, options = ids_BT.size(1), {} if positions_BT is None else self._document_arguments(positions_BT)
        if last_only and "logits_to_keep" in self._takes:
            options["logits_to_keep"] = 1
        if cache is not None:
            cache.length += T
            if "past_key_values" in self._takes:
                options |= {"past_key_values": cache.past, "use_cache": True}
            else:  # state-space and old classes have no such cache: the whole text is run again
                ids_BT = ids_BT if cache.ids_BT is None else torch.cat((cache.ids_BT, ids_BT), dim=1)
                cache.ids_BT = ids_BT
        if "use_cache" in self._takes:
            options.setdefault("use_cache", False)
        out = self.inner(input_ids=ids_BT, return_dict=True, **options)
        if cache is not None and "past_key_values" in self._takes:
            cache.past = out.past_key_values
        if labels_BT is None:
            return out.logits[:, -1:] if last_only else out.logits[:, -T:]
        return summed_cross_entropy_of_logits(out.logits.flatten(0, 1), labels_BT.flatten(), self._z_loss)

    def _document_arguments(self, positions_BT: Tensor) -> dict[str, Any]:
        """The words in which transformers is told of packed documents."""
        options: dict[str, Any] = {"position_ids": positions_BT}
        if str(self.inner.config._attn_implementation).startswith("flash"):
            # From positions alone it makes out documents anew in each block, and in a batch of one row only.
            starts, T = document_starts(positions_BT), positions_BT.size(1)
            options |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": T, "max_length_k": T}
        return options

    def new_cache(self, batch: int, max_length: int) -> HuggingFaceCache:  # noqa: ARG002 - it grows as it is used
        """See LanguageModel."""
        return HuggingFaceCache()


def build_transformers_model(
    section: TransformersSection, computing: ComputeOptions, device: torch.device | str, document_mask: bool
) -> HuggingFaceModel:
    """See kinds.build."""
    attention = computing.attention
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = _transformers_config(section)
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    flash = attention is not None and attention.name == "flash-attn"
    if attention is not None and attention.name == "sdpa" and not cls._supports_sdpa:
        raise _attention_kernel_error(cls, attention, "it has none", "math")
    # FlashAttention comes last, as the check of causality runs on the CPU.
    name = None if attention is None or flash else {"sdpa": "sdpa", "math": "eager"}[attention.name]
    meta = torch.device(device).type == "meta"
    try:
        with torch.device("meta" if meta else "cpu"):  # the same weights, whatever the device
            inner = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=name)
    except Exception as error:  # the class may stumble over its config anywhere
        raise _config_error(section, config, error) from error
    model = HuggingFaceModel(section, inner, computing.z_loss)
    if document_mask and "position_ids" not in model._takes:
        raise _document_mask_error(section, f"a forward of {cls.__name__} without position_ids")
    if not meta:
        _check_causality(model)
    if attention is not None and flash:
        _enable_flash_attention(inner, attention)
    if document_mask and not meta:
        # A copy goes where FlashAttention runs, for here it cannot.
        _check_document_mask(copy.deepcopy(model).to("cuda", torch.bfloat16) if flash else model)
    if computing.gradient_checkpointing != "none":
        assert computing.gradient_checkpointing == "full", "contradictions.py refuses all else"
        _enable_gradient_checkpointing(inner)
    return model.to(device)


def transformers_attention_dropout(section: TransformersSection) -> float:
    """See kinds.attention_dropout."""
    config = _transformers_config(section)
    return max(float(getattr(config, name, None) or 0.0) for name in ATTENTION_DROPOUTS)


def _transformers_config(section: TransformersSection) -> Any:
    """The config object of the class. Its own constructor would take a misspelt key for a new attribute."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind = section.model_type
    if kind not in CAUSAL:
        known = kind in CONFIG_MAPPING
        what = "a model_type without a causal language model" if known else "transformers knows no such model_type"
        raise UserError(Problem(what, repr(kind), suggest_choice(kind, CAUSAL), "model.model_type"))
    cls = CONFIG_MAPPING[kind]
    keys, alias = inspect.signature(cls).parameters, dict(cls.attribute_map)
    if alias.get("vocab_size", "vocab_size") not in keys:
        want = "a model of text alone, as llama, or the text part of this one, as gemma3_text"
        raise UserError(Problem("this model_type takes no vocab_size", repr(kind), want, "model.model_type"))
    values: dict[str, Any] = {alias.get("vocab_size", "vocab_size"): section.vocab_size}
    positions = alias.get("max_position_embeddings", "max_position_embeddings")
    if positions in keys:  # else nothing in the class depends on them: state spaces, ALiBi
        values[positions] = section.max_position_embeddings
    legal = {*keys, *alias, *(OLD_ROPE_KEYS if "rope_parameters" in keys else ())}
    problems: list[Problem] = []
    for key, value in section.config.items():
        name, where = alias.get(key, key), f"model.config.{key}"
        if key in SET_ELSEWHERE:
            problems.append(Problem(f"{key} is not the model's to say", repr(value), SET_ELSEWHERE[key], where))
        elif key == "output_router_logits" and value:
            problems.append(Problem("the loss is the cross entropy alone", f"{key}: true", "false", where))
        elif name in values:
            problems.append(Problem(f"{key} is said twice", f"{values[name]} and {value}", "it once", where))
        elif key not in legal:
            problems.append(Problem(f"unknown key {where}", repr(key), suggest_choice(key, legal), where))
        values[name] = value
    if problems:
        raise UserError(*problems)
    # Special ids are the tokenizer's. Of a class's own pad_token_id, often 0 or 1, the embedding would get no gradient;
    # here that is a token like any other, for rows are full and nothing is padding.
    optional = {name for name in SPECIAL_IDS if name in keys and "None" in str(keys[name].annotation)}
    values = dict.fromkeys(optional) | values
    layers = alias.get("num_hidden_layers", "num_hidden_layers")
    if isinstance(values.get(layers), int) and values[layers] > MAX_LAYERS:
        want = f"at most {MAX_LAYERS:,}"
        raise UserError(Problem("too many blocks", f"{values[layers]:,}", want, f"model.config.{layers}"))
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # TypeErrors, ValueErrors and those of huggingface_hub's strict dataclasses
        raise _config_error(section, cls, error) from error


def _config_error(section: TransformersSection, config: Any, error: Exception) -> UserError:
    """transformers' own words about a config, as a Problem that names the key if they do."""
    cause = error.__cause__ or error
    name = (config if isinstance(config, type) else type(config)).__name__
    field = re.search(r"[Ff]ield '(\w+)'", f"{error} {cause}")
    key = f"model.config.{field[1]}" if field else "model.config"
    said = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
    what = f"transformers refuses this config of {section.model_type}"
    return UserError(Problem(what, said, f"values that {name} takes", key))


@torch.no_grad()
def _check_causality(model: HuggingFaceModel) -> None:
    """Run two texts that differ in their last token: BERT, for one, lets the others see it unless told otherwise.

    Trained on, such a model reads its labels, and its loss falls to zero. Errors: UserError.
    """
    ids_BT = torch.zeros(2, 4, dtype=torch.long)
    ids_BT[1, -1] = model.section.vocab_size - 1
    model.eval()  # no dropout, so no random number is drawn
    try:
        ours, theirs = model(ids_BT)[:, :-1]
    except Exception as error:
        raise _config_error(model.section, model.inner.config, error) from error
    model.train()
    if (ours - theirs).abs().max() > 1e-4 * ours.abs().max():
        saw, want = "logits that depend on a later token", "a causal model, which some are with is_decoder: true"
        raise UserError(Problem(f"{model.section.model_type} sees the future", saw, want, "model.config"))


@torch.no_grad()
def _check_document_mask(model: HuggingFaceModel) -> None:
    """Change the first document of two rows: of the second nothing may move. Errors: UserError.

    That a class takes positions does not mean that it masks by them, nor that all its layers are attention.
    """
    positions_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]], device=model.device)
    second_BT = (positions_BT == 0).cumsum(1) == 2
    ids_BT = torch.zeros_like(positions_BT)
    changed_BT = ids_BT.masked_fill(~second_BT, model.section.vocab_size - 1)
    model.eval()
    try:
        before, after = (model(ids, positions_BT=positions_BT)[second_BT] for ids in (ids_BT, changed_BT))
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise _document_mask_error(model.section, said) from error
    model.train()
    if (before - after).abs().max() > 1e-4 * before.abs().max():
        kernel = model.inner.config._attn_implementation  # on another, it may do
        raise _document_mask_error(model.section, f"logits that depend on the document before, on {kernel}")


def _document_mask_error(section: TransformersSection, saw: str) -> UserError:
    what = f"{section.model_type} cannot keep packed documents apart"
    return UserError(Problem(what, saw, "false, or another model_type, as llama", "packing.document_mask"))


def _enable_flash_attention(inner: Any, kernel: AttentionKernel) -> None:
    """Let the model run on FlashAttention. Errors: UserError where its class cannot."""
    module = str(getattr(kernel.flash, "__module__", ""))
    name = "flash_attention_3" if module.startswith("flash_attn_interface") else "flash_attention_2"
    compatible = getattr(inner, "_compatible_flash_implementations", None)
    if compatible is not None and name not in compatible:  # transformers would fetch one of these from the Hub
        raise _attention_kernel_error(type(inner), kernel, f"it takes {', '.join(compatible)} only", "sdpa or math")
    try:
        inner.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise _attention_kernel_error(type(inner), kernel, str(error).partition("\n")[0], "sdpa or math") from error
    if inner.config._attn_implementation != name:  # some classes only log that they cannot change
        raise _attention_kernel_error(
            type(inner), kernel, f"it stays with {inner.config._attn_implementation}", "sdpa or math"
        )


def _attention_kernel_error(cls: type, kernel: AttentionKernel, saw: str, want: str) -> UserError:
    return UserError(Problem(f"{cls.__name__} cannot run on the kernel {kernel.name}", saw, want, "engine.attention"))


def _enable_gradient_checkpointing(inner: Any) -> None:
    """Gradient checkpointing of every block. Errors: UserError where the class has none."""
    # Newer versions have another name for it, and warn of the old one.
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        saw = str(error).partition("\n")[0]
        what = f"{type(inner).__name__} cannot recompute its blocks"
        raise UserError(Problem(what, saw, "none", "engine.gradient_checkpointing")) from error
