"""Any causal language model of `transformers`, with fresh weights, behind the same interface as our own decoder.

transformers is imported when the first such model is built. Nothing is downloaded and no remote code is run: a model
is a class of the installed package and the keys of a recipe. What is private in transformers is in
transformers_private.py.

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
from smoltrain.files import first_line
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.document_starts import find_document_starts
from smoltrain.kernels.flash_attention import FLASH2, FLASH3, FLASH4
from smoltrain.kernels.loss import summed_cross_entropy_of_logits
from smoltrain.model import transformers_private as private
from smoltrain.model.interface import ComputeOptions, LanguageModel, logits_differ

OLD_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # older names, which transformers still reads
CACHE_ARGUMENTS = ("cache", "past_key_values")  # since transformers 5.24, and before it
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SET_ELSEWHERE = {
    "dtype": "engine.precision",
    "torch_dtype": "engine.precision",
    "attn_implementation": "engine.attention",
}
FLASH_IMPLEMENTATIONS = {FLASH2: "flash_attention_2", FLASH3: "flash_attention_3", FLASH4: "flash_attention_4"}
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")


class HuggingFaceCache:
    """The tokens so far, in the cache that the class itself makes; where that is none or goes wrong, their ids."""

    def __init__(self) -> None:
        self.past: Any = None
        self.ids_BT: Tensor | None = None
        self.length = 0


class HuggingFaceModel(LanguageModel):
    """`inner` is transformers' own model: the keys of the state dict are 'inner.' and its own. See `build_model`."""

    def __init__(self, section: TransformersSection, inner: Any, z_loss: float = 0.0) -> None:
        super().__init__()
        self._section = section
        self._z_loss = z_loss
        self.inner = inner
        self.forward_arguments = set(inspect.signature(inner.forward).parameters)
        names = [name for name in CACHE_ARGUMENTS if name in self.forward_arguments]
        self.cache_argument = names[0] if names else None  # also where its cache is not used
        self.uses_cache = bool(names)  # see _is_cache_right

    @property
    def section(self) -> TransformersSection:
        """The class, and what was said of its shape."""
        return self._section

    def forward(
        self, ids_BT: Tensor, labels_BT: Tensor | None = None, cache: HuggingFaceCache | None = None, *,
        last_only: bool = False, positions_BT: Tensor | None = None, num_documents: int | None = None,
    ) -> Tensor:  # fmt: skip
        """See LanguageModel. The loss is the cross entropy alone, also where a class would add a router's.

        An attention mask is never passed, and a cache only by the caller: rows are full, so there is nothing to mask,
        and either of the two switches off, without a word, the masks that transformers makes between packed documents.
        """
        assert cache is None or positions_BT is None, "a cache continues one text, not packed documents"
        T = ids_BT.size(1)
        cache_argument = self.cache_argument if self.uses_cache else None
        options: dict[str, Any] = {}
        if positions_BT is not None:
            options |= self._document_arguments(positions_BT, num_documents)
        if last_only and "logits_to_keep" in self.forward_arguments:
            options["logits_to_keep"] = 1
        if "use_cache" in self.forward_arguments:
            options["use_cache"] = False
        if cache is not None:
            cache.length += T
            if cache_argument is not None:
                options |= {cache_argument: cache.past, "use_cache": True}
            else:  # state-space and old classes have no such cache: the whole text is run again
                if cache.ids_BT is not None:
                    ids_BT = torch.cat((cache.ids_BT, ids_BT), dim=1)
                cache.ids_BT = ids_BT
        out = self.inner(input_ids=ids_BT, return_dict=True, **options)
        if cache is not None and cache_argument is not None:
            cache.past = getattr(out, cache_argument)
        if labels_BT is None:
            return out.logits[:, -1:] if last_only else out.logits[:, -T:]
        return summed_cross_entropy_of_logits(out.logits.flatten(0, 1), labels_BT.flatten(), self._z_loss)

    def _document_arguments(self, positions_BT: Tensor, num_documents: int | None) -> dict[str, Any]:
        """The arguments by which transformers is told of packed documents."""
        options: dict[str, Any] = {"position_ids": positions_BT}
        if private.attention_implementation(self.inner).startswith("flash"):
            # From positions alone it makes out documents anew in each block, and in a batch of one row only.
            starts = find_document_starts(positions_BT, num_documents)
            T = positions_BT.size(1)
            options |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": T, "max_length_k": T}
        return options

    def new_cache(self, batch: int, max_length: int) -> HuggingFaceCache:  # noqa: ARG002 - it grows as it is used
        """See LanguageModel."""
        return HuggingFaceCache()


def build_transformers_model(
    section: TransformersSection, computing: ComputeOptions, device: torch.device | str, document_mask: bool
) -> HuggingFaceModel:
    """See model.build.build_model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    kernel = computing.attention
    config = _transformers_config(section)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kernel is not None and kernel.name == "sdpa" and not private.supports_sdpa(model_class, config):
        raise _attention_kernel_error(model_class, kernel, "it has none", "math")
    uses_flash = kernel is not None and kernel.name == "flash-attn"
    # FlashAttention comes last, as the check of causality runs on the CPU.
    implementation = None if kernel is None or uses_flash else {"sdpa": "sdpa", "math": "eager"}[kernel.name]
    on_meta = torch.device(device).type == "meta"
    try:
        with torch.device("meta" if on_meta else "cpu"):  # the same weights, whatever the device
            inner = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
    except Exception as error:  # the class may stumble over its config anywhere
        raise _config_error(section, config, error) from error
    model = HuggingFaceModel(section, inner, computing.z_loss)
    if document_mask and "position_ids" not in model.forward_arguments:
        raise _document_mask_error(section, f"a forward of {model_class.__name__} without position_ids")
    if not on_meta:
        _check_causality(model)
        model.uses_cache = model.uses_cache and _is_cache_right(model)
    if kernel is not None and uses_flash:
        _enable_flash_attention(inner, kernel)
    if document_mask and not on_meta:
        # A copy goes where FlashAttention runs, for here it cannot.
        _check_document_mask(copy.deepcopy(model).to("cuda", torch.bfloat16) if uses_flash else model)
    if computing.gradient_checkpointing != "none":
        assert computing.gradient_checkpointing == "full", "config/ refuses all else"
        _enable_gradient_checkpointing(inner)
    return model.to(device)


def transformers_attention_dropout(section: TransformersSection) -> float:
    """See model.build.model_attention_dropout."""
    config = _transformers_config(section)
    return max(float(getattr(config, name, None) or 0.0) for name in ATTENTION_DROPOUTS)


def _transformers_config(section: TransformersSection) -> Any:
    """The config object of the section's class. Errors: UserError for a class or a key that transformers lacks."""
    from transformers import AutoConfig

    config_class = _find_config_class(section.model_type)
    values = _collect_config_values(section, config_class)
    try:
        return AutoConfig.for_model(section.model_type, **values)
    except Exception as error:  # TypeErrors, ValueErrors and those of huggingface_hub's strict dataclasses
        raise _config_error(section, config_class, error) from error


def _find_config_class(model_type: str) -> Any:
    """Errors: UserError for a model type that is unknown, or no causal language model of text."""
    from transformers import CONFIG_MAPPING

    causal = private.causal_model_types()
    if model_type not in causal:
        known = model_type in CONFIG_MAPPING
        what = "a model_type without a causal language model" if known else "transformers knows no such model_type"
        raise UserError(Problem(what, repr(model_type), suggest_choice(model_type, causal), "model.model_type"))
    config_class = CONFIG_MAPPING[model_type]
    if _class_key(config_class, "vocab_size") not in inspect.signature(config_class).parameters:
        want = "a model of text alone, as llama, or the text part of this one, as gemma3_text"
        raise UserError(Problem("this model_type takes no vocab_size", repr(model_type), want, "model.model_type"))
    return config_class


def _class_key(config_class: Any, key: str) -> str:
    """The class's own name for a key, as GPT-2 says n_positions."""
    return config_class.attribute_map.get(key, key)


def _collect_config_values(section: TransformersSection, config_class: Any) -> dict[str, Any]:
    """The arguments of the config. The class itself would take a misspelt key for a new attribute.

    Errors: UserError for each key that is unknown, set twice, or set elsewhere in the recipe; and for too many blocks.
    """
    keys = inspect.signature(config_class).parameters
    values: dict[str, Any] = {_class_key(config_class, "vocab_size"): section.vocab_size}
    positions = _class_key(config_class, "max_position_embeddings")
    if positions in keys:  # else nothing in the class depends on them: state spaces, ALiBi
        values[positions] = section.max_position_embeddings
    legal = {*keys, *config_class.attribute_map}
    if "rope_parameters" in keys:
        legal |= set(OLD_ROPE_KEYS)
    problems: list[Problem] = []
    for key, value in section.config.items():
        name = _class_key(config_class, key)
        where = f"model.config.{key}"
        if key in SET_ELSEWHERE:
            problems.append(Problem(f"{key} is set elsewhere in the recipe", repr(value), SET_ELSEWHERE[key], where))
        elif key == "output_router_logits" and value:
            problems.append(Problem("the loss is the cross entropy alone", f"{key}: true", "false", where))
        elif name in values:
            problems.append(Problem(f"{key} is said twice", f"{values[name]} and {value}", "it once", where))
        elif key not in legal:
            problems.append(Problem(f"unknown key {where}", repr(key), suggest_choice(key, legal), where))
        values[name] = value
    if problems:
        raise UserError(*problems)
    layers = _class_key(config_class, "num_hidden_layers")
    if isinstance(values.get(layers), int) and values[layers] > MAX_LAYERS:
        want = f"at most {MAX_LAYERS:,}"
        raise UserError(Problem("too many blocks", f"{values[layers]:,}", want, f"model.config.{layers}"))
    # Special ids are the tokenizer's. Of a class's own pad_token_id, often 0 or 1, the embedding would get no gradient;
    # here that is a token like any other, for rows are full and nothing is padding.
    for name in SPECIAL_IDS:
        if name in keys and "None" in str(keys[name].annotation):
            values.setdefault(name, None)
    return values


def _config_error(section: TransformersSection, config: Any, error: Exception) -> UserError:
    """transformers' own words about a config, as a Problem that names the key if they do."""
    cause = error.__cause__ or error
    name = (config if isinstance(config, type) else type(config)).__name__
    field = re.search(r"[Ff]ield '(\w+)'", f"{error} {cause}")
    key = f"model.config.{field[1]}" if field else "model.config"
    saw = f"{type(cause).__name__}: {first_line(cause)}"
    what = f"transformers refuses this config of {section.model_type}"
    return UserError(Problem(what, saw, f"values that {name} takes", key))


@torch.no_grad()
def _check_causality(model: HuggingFaceModel) -> None:
    """Run two texts that differ in their last token: BERT, for one, lets the others see it unless told otherwise.

    Trained on, such a model reads its labels, and its loss falls to zero. Errors: UserError.
    """
    ids_BT = torch.ones(2, 4, dtype=torch.long)  # id 0 is padding to some classes, which sees nothing (cpmant)
    ids_BT[1, -1] = model.section.vocab_size - 1
    model.eval()  # no dropout, so no random number is drawn
    try:
        before, after = model(ids_BT)[:, :-1]
    except Exception as error:
        raise _config_error(model.section, model.inner.config, error) from error
    model.train()
    if logits_differ(before, after):
        want = "a causal model, which some are with is_decoder: true"
        what = f"{model.section.model_type} sees the future"
        raise UserError(Problem(what, "logits that depend on a later token", want, "model.config"))


@torch.no_grad()
def _is_cache_right(model: HuggingFaceModel) -> bool:
    """Whether a text has the same logits with the class's own cache, token by token behind a prompt.

    Found in transformers 5.23: hybrids of attention and linear attention raise where their layers are all linear, as a
    few may be (bamba, jamba, qwen3_next). Without its cache a class is slower.
    """
    ids_BT = torch.ones(1, 6, dtype=torch.long)
    ids_BT[0, ::2] = model.section.vocab_size - 1
    cache = model.new_cache(1, 6)
    model.eval()
    try:
        pieces = [model(piece_BT, cache=cache) for piece_BT in ids_BT.split((3, 1, 1, 1), dim=1)]
        is_right = not logits_differ(model(ids_BT), torch.cat(pieces, dim=1))
    except Exception:  # whatever its code raises: the causality check has shown that it runs without
        is_right = False
    model.train()
    return is_right


@torch.no_grad()
def _check_document_mask(model: HuggingFaceModel) -> None:
    """Change the first document of two rows: of the second nothing may move. Errors: UserError.

    That a class takes positions does not mean that it masks by them, nor that all its layers are attention.
    """
    positions_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]], device=model.device)
    in_second_BT = (positions_BT == 0).cumsum(1) == 2
    ids_BT = torch.ones_like(positions_BT)
    changed_BT = ids_BT.masked_fill(~in_second_BT, model.section.vocab_size - 1)
    model.eval()
    try:
        before = model(ids_BT, positions_BT=positions_BT)[in_second_BT]
        after = model(changed_BT, positions_BT=positions_BT)[in_second_BT]
    except Exception as error:
        raise _document_mask_error(model.section, f"{type(error).__name__}: {first_line(error)}") from error
    model.train()
    if logits_differ(before, after):
        kernel = private.attention_implementation(model.inner)  # on another, it may do
        raise _document_mask_error(model.section, f"logits that depend on the document before, on {kernel}")


def _document_mask_error(section: TransformersSection, saw: str) -> UserError:
    what = f"{section.model_type} cannot keep packed documents apart"
    return UserError(Problem(what, saw, "false, or another model_type, as llama", "packing.document_mask"))


def _enable_flash_attention(inner: Any, kernel: AttentionKernel) -> None:
    """Let the model run on FlashAttention. Errors: UserError where its class cannot."""

    def cannot(saw: str) -> UserError:
        return _attention_kernel_error(type(inner), kernel, saw, "sdpa or math")

    name = FLASH_IMPLEMENTATIONS[kernel.package]
    compatible = private.compatible_flash_implementations(inner)
    if compatible is not None and name not in compatible:  # transformers would fetch one of these from the Hub
        raise cannot(f"it takes {', '.join(compatible)} only")
    try:
        inner.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise cannot(first_line(error)) from error
    if private.attention_implementation(inner) != name:  # some classes only log that they cannot change
        raise cannot(f"it stays with {private.attention_implementation(inner)}")


def _attention_kernel_error(cls: type, kernel: AttentionKernel, saw: str, want: str) -> UserError:
    return UserError(Problem(f"{cls.__name__} cannot run on the kernel {kernel.name}", saw, want, "engine.attention"))


def _enable_gradient_checkpointing(inner: Any) -> None:
    """Gradient checkpointing of every block. Errors: UserError where the class has none."""
    # Newer versions have another name for it, and warn of the old one.
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        what = f"{type(inner).__name__} cannot recompute its blocks"
        raise UserError(Problem(what, first_line(error), "none", "engine.gradient_checkpointing")) from error
