"""The lowest version of transformers that a model card names loads every class of export, in its own environment."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from smoltrain.export import export, verify
from smoltrain.export.model_card import MIN_TRANSFORMERS_VERSION
from smoltrain.export.verify import verify_export
from smoltrain.inference.load import load_trained_model
from smoltrain.model.hf_config import MODELING_FILE
from tests import folders
from tests.data.tokenizers.test_companions import TALK, continued
from tests.export.test_export import OTHERS, SYSTEM_4

SHAPES = {
    "LlamaForCausalLM": (),
    "SmoltrainForCausalLM": SYSTEM_4,
    **{name: (*(f"model.{w}" for w in words), "model.num_key_value_heads=4") for name, words in OTHERS.items()},
    "GPTNeoXForCausalLM, tied": ("model.norm=layernorm", "model.mlp=gelu", "model.num_key_value_heads=4"),
    "rows without a token": ("model.vocab_size=400",),
}
TOKENIZER = """
import json, sys
from transformers import AutoTokenizer
theirs = AutoTokenizer.from_pretrained(sys.argv[1])
talk = theirs.apply_chat_template(json.loads(sys.argv[2]), tokenize=False)
print(json.dumps([talk, theirs.padding_side, theirs.all_special_tokens, dict(theirs("a king"))]))
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with folders.one_thread():
        yield


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with that transformers and what it asks for; torch is ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    words = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*words, f"transformers=={MIN_TRANSFORMERS_VERSION}.*"], check=True)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "ours.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # comes last on the path
    code = "import transformers; print(transformers.__version__)"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    assert version.startswith(f"{MIN_TRANSFORMERS_VERSION}.")
    return python


def run(python: Path, code: str, *words: str) -> str:
    done = subprocess.run(
        [python, "-c", code, *words], check=False, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(python.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SHAPES)
def test_the_lowest_version_gives_the_same_logits_and_text(
    python: Path, tmp_path: Path, name: str, believed: None, monkeypatch: pytest.MonkeyPatch
):
    loaded = load_trained_model(str(folders.run(tmp_path, *SHAPES[name])))
    out = export.export_model(str(loaded.folder), tmp_path / "out", say=lambda line: None)
    with monkeypatch.context() as patched:
        patched.setattr(verify.sys, "executable", str(python))
        verdict = verify_export(loaded, out)
    assert verdict.class_name == ("LlamaForCausalLM" if name.startswith("rows") else name.partition(",")[0])
    text = (out / "README.md").read_text()
    assert f"With transformers {MIN_TRANSFORMERS_VERSION} or newer" in text
    code = text.split("```python\n")[1].split("```")[0].replace('"quickstart"', repr(str(out)))
    assert run(python, code).startswith("Once upon a time")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_lowest_version_reads_a_chat_model(python: Path, tmp_path: Path, believed: None):
    ids = folders.chat(tmp_path / "chat", template_file=True)
    made = continued(tmp_path, tmp_path / "chat")
    out = export.export_model(str(made), tmp_path / "out", say=lambda line: None)
    talk, side, special, encoded = json.loads(run(python, TOKENIZER, str(out), json.dumps(TALK)))
    now: Any = AutoTokenizer.from_pretrained(out)
    assert (talk, side) == (now.apply_chat_template(TALK, tokenize=False), "left")
    assert set(special) == ids.keys()
    assert encoded == dict(now("a king"))


def test_all_that_name_the_version_name_the_same():
    assert f"transformers ({MIN_TRANSFORMERS_VERSION} or newer)" in MODELING_FILE.read_text()
    root = Path(__file__).parents[2]
    for page in ("README.md", "docs/export.md"):
        assert f"transformers {MIN_TRANSFORMERS_VERSION} or newer" in " ".join((root / page).read_text().split())
