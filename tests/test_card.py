"""What the card of an export, which `push` publishes, says of the data and of the recipe, and what it must not say."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from smoltrain import card, config, export, runfolder
from smoltrain.schema import DataSection
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
    assert card._data(DataSection.model_validate(section)) == told


def test_the_recipe_is_the_file_that_was_trained_and_no_run(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text((config.RECIPES / "quickstart.yaml").read_text())
    words = tiny.words(tmp_path, "run.name=tuesday")
    settings = config.load(str(tmp_path / "mine.yaml"), words)
    assert (settings.run.recipe, settings.run.name) == ("mine", "tuesday")
    runfolder.enter(settings, 1, 0)
    own = settings.run_folder / "config.yaml"
    assert config.load(str(own)).run.recipe == "mine", "its own config is no other recipe"
    assert card._training(settings, tmp_path / "none.jsonl", 1, 2)["recipe"] == "mine"
    own.write_text(own.read_text().replace("recipe: mine", "recipe: ''"))
    older = config.load(str(own))
    assert older.run.recipe == ""
    assert "recipe" not in card._training(older, tmp_path / "none.jsonl", 1, 2)


WHOLE = {"format": 1, "smoltrain": "0", "run": "a", "run_id": "b", "step": 1, "last_step": None, "files": {}}


@pytest.mark.parametrize("key", WHOLE)
def test_a_marker_of_the_wrong_kind_is_none(tmp_path: Path, key: str):
    file = tmp_path / export.MARKER
    file.write_text(json.dumps(WHOLE))
    assert export.marker_of(tmp_path) == WHOLE
    for value in ([], 1.5, {"a": []} if key != "files" else "x"):
        file.write_text(json.dumps(WHOLE | {key: value}))
        assert export.marker_of(tmp_path) is None
    file.write_text(json.dumps({k: v for k, v in WHOLE.items() if k != key}))
    assert export.marker_of(tmp_path) is None


def test_a_marker_that_is_a_pipe_or_too_deep_is_none(tmp_path: Path):
    file = tmp_path / export.MARKER
    file.write_text("[" * 10**5)
    assert export.marker_of(tmp_path) is None
    file.unlink()
    os.mkfifo(file)
    assert export.marker_of(tmp_path) is None
