"""A checkpoint is verified before it is used: any harm to any file is seen, and the one before is taken."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smoltrain.checkpoint.manifest import (
    Manifest,
    find_newest_valid_checkpoint,
    step_folder,
    verify_checkpoint,
    write_manifest,
)
from smoltrain.errors import UserError


def harm_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def harm_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def harm_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [harm_truncate, harm_flip, harm_empty, Path.unlink])
def test_any_harm_to_any_file_falls_back_and_names_the_file(two_checkpoints: Path, harm: Any) -> None:
    newest = step_folder(two_checkpoints, 6)
    spare = newest.with_name("spare")
    shutil.copytree(newest, spare)
    for path in sorted(p for p in spare.rglob("*") if p.is_file()):
        name = path.relative_to(spare)
        harm(newest / name)
        said: list[str] = []
        manifest = find_newest_valid_checkpoint(two_checkpoints, said.append)
        assert manifest is not None
        assert manifest.step == 3
        assert len(said) == 1
        assert "step 6" in said[0]
        assert name.name in said[0]
        shutil.copy2(path, newest / name)
    manifest = find_newest_valid_checkpoint(two_checkpoints, print)
    assert manifest is not None
    assert manifest.step == 6


def test_never_from_scratch_without_a_word(two_checkpoints: Path) -> None:
    for step in (3, 6):
        harm_flip(step_folder(two_checkpoints, step) / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint of this run is whole"):
        find_newest_valid_checkpoint(two_checkpoints, lambda _: None)
    assert find_newest_valid_checkpoint(two_checkpoints.parent / "none", print) is None


def test_a_manifest_of_another_format_is_not_read(two_checkpoints: Path) -> None:
    path = step_folder(two_checkpoints, 6) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert "format 99" in str(verify_checkpoint(path.parent))


def test_a_manifest_of_the_format_before_is_read(two_checkpoints: Path) -> None:
    folder = step_folder(two_checkpoints, 6)
    manifest = verify_checkpoint(folder)
    assert isinstance(manifest, Manifest)
    write_manifest(folder, replace(manifest, format=3))
    assert verify_checkpoint(folder) == replace(manifest, format=3)


def test_a_folder_that_cannot_be_looked_at_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="the checkpoints cannot be looked at"):
        find_newest_valid_checkpoint(tmp_path / "checkpoints", print)


def test_a_manifest_of_another_step_is_not_believed(two_checkpoints: Path) -> None:
    old, new = (step_folder(two_checkpoints, step) for step in (3, 6))
    shutil.rmtree(new)
    shutil.copytree(old, new)
    assert "is that of step 3" in str(verify_checkpoint(new))
