"""A version of transformers without a name that smoltrain reads is told in one line, and crashes nothing."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.auto import modeling_auto

from smoltrain.errors import UserError
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.model.build import model_attention_dropout
from tests.model.test_transformers_model import built, section

SDPA = AttentionKernel("sdpa", "test")


def remove(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """The name from a class and all that it inherits from."""
    for part in owner.__mro__:
        if name in vars(part):
            monkeypatch.delattr(part, name)


def refused(name: str, problem: pytest.ExceptionInfo[UserError]) -> bool:
    """Whether the one problem names it, and what to change."""
    (only,) = problem.value.problems
    return only.saw.endswith(f" without {name}") and only.change == "the environment"


def test_the_table_of_causal_classes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    with pytest.raises(UserError) as error:
        model_attention_dropout(section("llama"))
    assert refused("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", error)


def test_whether_a_class_has_sdpa(monkeypatch: pytest.MonkeyPatch):
    remove(monkeypatch, LlamaForCausalLM, "_supports_sdpa")
    with pytest.raises(UserError) as error:
        built("llama", options={"attention": SDPA})
    assert refused("_supports_sdpa", error)


def test_the_kernel_that_a_model_runs_on(monkeypatch: pytest.MonkeyPatch):
    model = built("llama", options={"attention": SDPA})
    monkeypatch.setattr(model.inner, "config", SimpleNamespace())
    positions = torch.arange(4)[None]
    with pytest.raises(UserError) as error:
        model(torch.zeros(1, 4, dtype=torch.long), positions_BT=positions)
    assert refused("_attn_implementation", error)


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "there"])
def test_the_flash_kernels_that_a_class_takes(monkeypatch: pytest.MonkeyPatch, gone: bool):
    """transformers would fetch from the Hub what is not in the list; where it has no list, it is seen what it did."""
    taken: list[str] = []
    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", lambda model, name: taken.append(name))
    monkeypatch.setattr(LlamaForCausalLM, "_compatible_flash_implementations", ["hub/flash"], raising=False)
    if gone:
        remove(monkeypatch, LlamaForCausalLM, "_compatible_flash_implementations")
    with pytest.raises(UserError, match="it stays with" if gone else "it takes hub/flash only"):
        built("llama", options={"attention": AttentionKernel("flash-attn", "test", print, package="flash_attn")})
    assert taken == (["flash_attention_2"] if gone else [])
