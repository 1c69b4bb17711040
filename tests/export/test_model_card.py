"""What the card of an export, which `push` publishes, says of the data and of the recipe, and what it must not say."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from smoltrain import __version__
from smoltrain.config.load import RECIPES_FOLDER, load_config
from smoltrain.config.schema import DataSection
from smoltrain.export.model_card import _describe_data, _training_facts, read_last_metrics
from tests import tiny
from tests.test_redact import AMZ, SECRET
from tests.tiny import enter_run_folder

TEXT_FILES = ("README.md", "config.json", "generation_config.json", "smoltrain.json", "tokenizer.json")
TEXT_FILES = (*TEXT_FILES, "tokenizer_config.json")
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


def test_the_card(run: Path, exported: tuple[Path, str]):
    text = (exported[0] / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    for line in (
        "# quickstart",
        f"smoltrain {__version__}",
        "| class | `LlamaForCausalLM` |",
        "| parameters | 28,832 |",
        "| steps | 12 of 12 (main: 8 steps, cosine; continuation: 4 steps, linear) |",
        "| data | local files, `corpus` |",
        "| tokens seen | 768 in rows of 16 |",
        "| training loss of the last step, nats per token | 4.8000 |",
        "| validation loss, nats per token | 7.0000 |",
    ):
        assert line in body
    assert "unfinished" not in text
    assert "trust_remote_code" not in text
    everything = "".join((exported[0] / name).read_text() for name in TEXT_FILES)
    assert str(run.parent.parent) not in everything, "no path of this machine"


def test_the_card_tells_how_to_load_it(exported: tuple[Path, str], capsys: pytest.CaptureFixture[str]):
    code = (exported[0] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('folder = "quickstart"', f"folder = {str(exported[0])!r}"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_metrics_of_later_steps_are_not_the_cards(run: Path, tmp_path: Path):
    assert read_last_metrics(run / "metrics.jsonl", 8)["train/loss_nats_per_token"] == pytest.approx(5.2)
    cut = tmp_path / "metrics.jsonl"
    cut.write_text('{"step": 1, "train/loss_nats_per_token": 5}\n{"step": 2, "train/lo')
    assert read_last_metrics(cut, 8)["step"] == 1
    assert read_last_metrics(tmp_path / "none.jsonl", 8) == {}
