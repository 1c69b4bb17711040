"""The class that exports carry computes what our decoder does, and is a class of transformers like any other."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from smoltrain.config.schema import GenerationSection, ModelSection
from smoltrain.export.modeling_smoltrain import CACHE_FIELD, SmoltrainConfig, SmoltrainForCausalLM
from smoltrain.inference.generate import generate_ids
from smoltrain.model.hf_config import MODELING_FILE, SMOLTRAIN, hf_class_name
from smoltrain.model.hf_format import convert_to_hf_tensors
from tests import folders
from tests.model.test_hf_format import CASES, SYSTEM_4, ids, section


def own_model(shape: ModelSection, weights: dict[str, Tensor]) -> SmoltrainForCausalLM:
    model = SmoltrainForCausalLM(SmoltrainConfig(**shape.model_dump(exclude={"kind"})))
    names = convert_to_hf_tensors(shape, weights) if hf_class_name(shape) == SMOLTRAIN else {}
    missing = model.load_state_dict(names or {f"model.{n}": x for n, x in weights.items()}, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("case", ["system-4", "own-gpt2-untied", "own-neox-gqa"])
def test_our_own_class_writes_the_same_text(case: str):
    shape = section(CASES[case][1])
    ours = folders.lively(shape)
    theirs: Any = own_model(shape, dict(ours.named_parameters()))
    settings, prompt = GenerationSection(max_tokens=16), ids(1, 12)
    want = list(generate_ids(ours, prompt[0].tolist(), settings, stop_ids=(), greedy=True))
    assert len(set(want)) > 3
    for options in ({}, {"use_cache": False}):
        new = theirs.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
        assert new[0, 12:].tolist() == want
    both = torch.cat((torch.zeros(1, 5, dtype=torch.long), prompt[:, :7]), 1)  # the shorter one padded on the left
    batch, mask = torch.cat((prompt, both)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = theirs.generate(batch, attention_mask=mask, **options)
    assert together[0, 12:].tolist() == want[:6]
    alone = theirs.generate(prompt[:, :7], **options)
    assert together[1, 12:].tolist() == alone[0, 7:].tolist()
    beams = theirs.generate(prompt, num_beams=2, **options)  # reorders the cache
    assert beams.shape == (1, 18)


@torch.no_grad()
@pytest.mark.parametrize("mlp", get_args(ModelSection.model_fields["mlp"].annotation))
def test_each_mlp_of_the_schema_is_in_the_class_that_exports_carry(mlp: str):
    shape = section({**SYSTEM_4, "mlp": mlp})
    assert hf_class_name(shape) == SMOLTRAIN, "what no class of transformers has"
    ours = folders.lively(shape)
    theirs: Any = own_model(shape, dict(ours.named_parameters()))
    torch.testing.assert_close(theirs(ids()).logits, ours(ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["system-4", "own-gpt2-untied", "own-swiglu-layernorm"])
def test_our_own_class_learns_alike(case: str):
    shape = section(CASES[case][1])
    ours = folders.lively(shape)
    theirs: Any = own_model(shape, dict(ours.named_parameters())).train()
    x, labels = ids(), ids().clone()
    labels[0, 3:6] = -100
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    want = ours.train()(x, shifted) / (shifted != -100).sum()
    want.backward()
    got = theirs(x, labels=labels).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    got.backward()
    gradients = convert_to_hf_tensors(shape, {n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_our_own_class_is_one_of_transformers():
    shape = section(SYSTEM_4)
    model: Any = own_model(shape, dict(folders.lively(shape).named_parameters()))
    x = ids()
    whole = model(x)
    torch.testing.assert_close(model(x, logits_to_keep=3).logits, whole.logits[:, -3:])
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(x)).logits, whole.logits)
    assert getattr(model(x, use_cache=False), CACHE_FIELD) is None
    for name in ("past_key_values", "cache"):  # before transformers 5.24, and since
        cache = getattr(model(x[:, :8]), CACHE_FIELD)
        rest = model(x[:, 8:], **{name: cache})
        torch.testing.assert_close(rest.logits, whole.logits[:, 8:], rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match="passes its cache as 'memory'"):
        model(x[:, 8:], memory=cache)
    counted = model(x, labels=x, num_items_in_batch=torch.tensor(76)).loss  # as the Trainer asks: 2 x 19 labels, halved
    torch.testing.assert_close(counted * 2, model(x, labels=x).loss)
    rough = model.bfloat16()
    assert rough(x).logits.dtype == torch.bfloat16


def test_the_exported_code_needs_no_smoltrain():
    text = MODELING_FILE.read_text(encoding="utf-8")
    assert "import smoltrain" not in text
    assert "from smoltrain" not in text


def test_the_blocks_that_transformers_must_not_split_are_named():
    """A device_map would put parts of a block on two devices, and its additions would fail."""
    model = own_model(section(SYSTEM_4), dict(folders.lively(section(SYSTEM_4)).named_parameters()))
    names = {type(module).__name__ for module in model.modules()}
    unsplit = set(model._no_split_modules or ())
    assert unsplit == {"SmoltrainBlock"} <= names


@pytest.mark.parametrize(("name", "broken"), [("_tied_weights_keys", {}), ("_supports_sdpa", False)])
def test_a_transformers_that_asks_by_other_names_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any
):
    """The class says some things under private names. `verify_export` refuses an export whose tensors have no place."""
    folders.hub(tmp_path, section(SYSTEM_4))
    load: Any = SmoltrainForCausalLM.from_pretrained
    _, report = load(tmp_path, attn_implementation="sdpa", output_loading_info=True)
    assert not any(report.values())
    monkeypatch.setattr(SmoltrainForCausalLM, name, broken)
    if name == "_supports_sdpa":
        with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
            load(tmp_path, attn_implementation="sdpa")
    else:
        _, report = load(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == {"lm_head.weight"}
