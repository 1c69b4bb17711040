"""A folder whose files are not whole is refused in a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import UserError
from smoltrain.model.hf_format import read_hf_decoder
from smoltrain.model.hf_weights import WEIGHT_INDEX
from tests import folders
from tests.model.test_hf_format import GQA, section


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def shards(folder: Path, index: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / WEIGHT_INDEX).write_text(json.dumps(index))


DAMAGED: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: cut(f / "model.safetensors"), "the weights cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes(b"no tensors at all"), "the weights cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "the weights cannot be read"),
    (lambda f: (f / "model.safetensors").unlink(), "has no weights: saw neither of the two, want model.safetensors or"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "saw pytorch_model.bin, a pickle, which co"),
    (lambda f: shards(f, {"weight_map": {"a": "../model.safetensors"}}), "the index of the weights is damaged"),
    (lambda f: shards(f, ["a"]), "index.json cannot be read: saw it holds a list"),
    (lambda f: shards(f, {"weight_map": {"a": "model-00002.safetensors"}}), "the weights cannot be read"),
    (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_folder_that_is_not_whole(tmp_path: Path, damage: Callable[[Path], Any], message: str):
    folders.hub(tmp_path, section(GQA))
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read_hf_decoder(tmp_path)
    assert len(str(error.value).splitlines()) == 1
