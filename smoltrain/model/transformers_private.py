"""Every name of transformers that smoltrain reads though it is private; if one is gone, an error that says so.

All of them were found in transformers 5.17 and 5.24.
modeling_smoltrain.py also sets some, which transformers reads: an export where it no longer does is not published.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from smoltrain.errors import Problem, UserError


def causal_model_types() -> Mapping[str, str]:
    """The model types that have a causal language model, each with the name of its class."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        raise _unknown_transformers("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES") from None
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def supports_sdpa(model_class: Any, config: Any) -> bool:
    """Whether the class can run on torch's scaled_dot_product_attention, as the config wants it to.

    That one cannot cap scores: where the config asks for it (Gemma 2) transformers 5.17 would leave the cap off and say
    nothing of it; later ones say that the class cannot run on it.
    """
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return bool(_read_attribute(model_class, "_supports_sdpa")) and not is_capped


def attention_implementation(model: Any) -> str:
    """The attention kernel that a model runs on now: 'sdpa', 'eager', 'flash_attention_2', ..."""
    return str(_read_attribute(model.config, "_attn_implementation"))


def compatible_flash_implementations(model: Any) -> Sequence[str] | None:
    """The only kernels of FlashAttention that the class takes; None where it takes any, or transformers has no word.

    Without the word the caller learns it afterwards, from `attention_implementation`.
    """
    return getattr(model, "_compatible_flash_implementations", None)


def _read_attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise _unknown_transformers(name) from None


def _unknown_transformers(name: str) -> UserError:
    import transformers

    saw = f"transformers {transformers.__version__} without {name}"
    want = "a version that has it, as 5.17 to 5.24, or a decoder of smoltrain"
    return UserError(Problem("smoltrain does not know this version of transformers", saw, want, "the environment"))
