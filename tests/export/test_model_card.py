"""What the card of an export, which `push` publishes, says of the data and of the recipe, and what it must not say."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.load import RECIPES_FOLDER, load_config
from smoltrain.config.schema import DataSection
from smoltrain.export.export import read_export_marker
from smoltrain.export.model_card import _describe_data, _training_facts
from smoltrain.inference.load import EXPORT_MARKER_FILE
from smoltrain.run.run_folder import enter_run_folder
from tests import tiny
from tests.test_redact import AMZ, SECRET

HUB = "[me/texts](https://huggingface.co/datasets/me/texts)"


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"hub": "me/texts"}, HUB),
        ({"path": "/home/somebody/corpus"}, "local files, `corpus`"),
        ({"path": "~/secret plans/*.jsonl"}, "local files, `*.jsonl`"),
        ({"path": f"https://me:{SECRET}@inner.host/a/b.jsonl?{AMZ}"}, "files behind a URL, `b.jsonl`"),
        ({"path": f"https://host/b.jsonl?id=5&token={SECRET}"}, "files behind a URL, `b.jsonl`"),
        (
            {
                "sources": [
                    {"name": "web", "weight": 3.0, "path": f"s3://key:{SECRET}@bucket/web"},
                    {"name": "books", "weight": 1.0, "hub": "me/texts"},
                ]
            },
            f"web (75.0%): files behind a URL, `web`; books (25.0%): {HUB}",
        ),
    ],
)
def test_the_data_of_every_kind(section: dict[str, Any], told: str):
    assert _describe_data(DataSection.model_validate(section)) == told


def test_the_recipe_is_the_file_that_was_trained_and_no_run(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text((RECIPES_FOLDER / "quickstart.yaml").read_text())
    words = tiny.words(tmp_path, "run.name=tuesday")
    settings = load_config(str(tmp_path / "mine.yaml"), words)
    assert (settings.run.recipe, settings.run.name) == ("mine", "tuesday")
    enter_run_folder(settings, 1, 0)
    own = settings.run_folder / "config.yaml"
    assert load_config(str(own)).run.recipe == "mine", "its own config is no other recipe"
    assert _training_facts(settings, tmp_path / "none.jsonl", 1, 2)["recipe"] == "mine"
    own.write_text(own.read_text().replace("recipe: mine", "recipe: ''"))
    older = load_config(str(own))
    assert older.run.recipe == ""
    assert "recipe" not in _training_facts(older, tmp_path / "none.jsonl", 1, 2)


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
