"""What marks a folder as a verified export, and what does not."""

import json
import os
import shutil
from pathlib import Path

import pytest

from smoltrain.export.marker import ExportSource, read_export_marker, read_verified_marker
from smoltrain.inference.find_run import EXPORT_MARKER_FILE

WHOLE = {"format": 1, "smoltrain": "0", "run": "a", "run_id": "b", "step": 1, "last_step": None, "files": {}}


@pytest.mark.parametrize("key", WHOLE)
def test_a_marker_of_the_wrong_kind_is_none(tmp_path: Path, key: str):
    file = tmp_path / EXPORT_MARKER_FILE
    file.write_text(json.dumps(WHOLE))
    assert read_export_marker(tmp_path) == WHOLE
    for value in ([], 1.5, {"a": []} if key != "files" else "x"):
        file.write_text(json.dumps(WHOLE | {key: value}))
        assert read_export_marker(tmp_path) is None
    file.write_text(json.dumps({k: v for k, v in WHOLE.items() if k != key}))
    assert read_export_marker(tmp_path) is None


def test_a_marker_that_is_a_pipe_or_too_deep_is_none(tmp_path: Path):
    file = tmp_path / EXPORT_MARKER_FILE
    file.write_text("[" * 10**5)
    assert read_export_marker(tmp_path) is None
    file.unlink()
    os.mkfifo(file)
    assert read_export_marker(tmp_path) is None


@pytest.mark.parametrize("change", ["a file more", "a file less", "a byte more"])
def test_an_export_that_was_changed_is_no_verified_one(exported: tuple[Path, str], tmp_path: Path, change: str):
    folder = shutil.copytree(exported[0], tmp_path / "copy")
    assert read_verified_marker(folder) == read_export_marker(folder) is not None
    if change == "a file more":
        (folder / "notes.txt").write_text("mine")
    elif change == "a file less":
        (folder / "tokenizer_config.json").unlink()
    else:
        with (folder / "README.md").open("a") as card:
            card.write(" ")
    assert read_export_marker(folder) is not None
    assert read_verified_marker(folder) is None


@pytest.mark.parametrize(
    ("step", "last_step", "label"),
    [(8, 12, "unfinished: step 8 of 12"), (12, 12, None), (13, 12, None), (None, None, None)],
)
def test_an_export_of_an_early_step_says_so(step: int | None, last_step: int | None, label: str | None):
    assert ExportSource("run", "id", step, last_step).unfinished_label == label
