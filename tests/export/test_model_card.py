"""What the card of an export, which `push` publishes, says of the data and of the recipe, and what it must not say."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from smoltrain import __version__
from smoltrain.config.load import RECIPES_FOLDER, load_config
from smoltrain.config.schema import Config, DataSection, ExportSection
from smoltrain.evaluation.results import Evaluation, TaskDetails, write_evaluation
from smoltrain.export import export
from smoltrain.export.card_metadata import _hub_datasets, write_card_metadata
from smoltrain.export.marker import ExportSource
from smoltrain.export.model_card import (
    _describe_source,
    _list_sources,
    _training_facts,
    build_model_card,
    read_last_metrics,
)
from smoltrain.files import format_json_line
from smoltrain.inference.load import load_trained_model
from tests import folders, tiny
from tests.evaluation.test_results import DETAILS
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
        ({"path": "a`b|c<script>"}, "local files, ``a`b\\|c<script>``"),
        ({"hub": "me/<b>|x"}, r"[me/\<b\>\|x](https://huggingface.co/datasets/me/bx)"),
    ],
)
def test_the_data_of_every_kind(section: dict[str, Any], told: str):
    assert _describe_source(DataSection.model_validate(section)) == told


def test_shares_are_those_of_the_tokens_seen_else_of_the_weights():
    sources = [
        {"name": "web", "weight": 3.0, "path": f"s3://key:{SECRET}@bucket/web"},
        {"name": "books", "weight": 1.0, "hub": "me/texts"},
    ]
    data = DataSection.model_validate({"sources": sources})
    web, books = "files behind a URL, `web`", HUB
    assert _list_sources(data, {}) == [("web", web, "75.0%"), ("books", books, "25.0%")]
    seen = {"data/tokens_by_source/web": 900, "data/tokens_by_source/books": 100}
    assert _list_sources(data, seen) == [("web", web, "90.0%"), ("books", books, "10.0%")]


def test_the_recipe_is_the_file_that_was_trained_and_no_run(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text((RECIPES_FOLDER / "quickstart.yaml").read_text())
    words = tiny.words(tmp_path, "run.name=tuesday")
    settings = load_config(str(tmp_path / "mine.yaml"), words)
    assert (settings.run.recipe, settings.run.name) == ("mine", "tuesday")
    enter_run_folder(settings, 1, 0)
    own = settings.run_folder / "config.yaml"
    assert load_config(str(own)).run.recipe == "mine", "its own config is no other recipe"
    assert _training_facts(settings, {}, 1, 2)["recipe"] == "mine"
    own.write_text(own.read_text().replace("recipe: mine", "recipe: ''"))
    older = load_config(str(own))
    assert older.run.recipe == ""
    assert "recipe" not in _training_facts(older, {}, 1, 2)


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
        "| held-out documents | validation loss, nats per token | 7.0000 |",
        "| licence | not stated by its author |",
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


def test_an_evaluation_of_an_earlier_step_is_none_of_these_weights(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    lines = (
        {"step": 4, "validation/loss_nats_per_token": 5.0, "memorisation/share_of_13_grams": 0.5},
        {"step": 4, "data/repeat_factor": 1.25},
        {"step": 6, "train/loss_nats_per_token": 6.0},
    )
    file.write_text("".join(map(format_json_line, lines)))
    assert read_last_metrics(file, 4)["validation/loss_nats_per_token"] == 5.0
    assert {*read_last_metrics(file, 6)} == {"step", "train/loss_nats_per_token", "data/repeat_factor"}


# --- what the Hub reads


SAMPLE = "</code>```\n````<script>alert(1)</script>| # no title"


@pytest.fixture(scope="module")
def told_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with samples, results of tasks, a curve, a licence and languages."""
    words = ("export.license=apache-2.0", "export.language=[en, 'no']")
    run = folders.run(tmp_path_factory.mktemp("told"), *words)
    lines = [{"step": 6, "prompt": "old", "text": "er"}, {"step": 12, "prompt": "The ", "text": SAMPLE}]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "plots").mkdir()
    (run / "plots" / "loss.png").write_bytes(b"PNG")
    tasks = {"arc|easy": {"acc": 0.25, "acc_stderr": 0.01, "acc_norm": 0.5}}
    tasks |= {"mmlu": {"acc": 0.5}, "piqa": {"acc": 0.75}}
    measured: dict[str, TaskDetails] = {
        "arc|easy": {**DETAILS, "limit": 10, "documents": 10},
        "mmlu": {**DETAILS, "limit": 10, "documents": 0},
        "piqa": {**DETAILS, "limit": 100, "documents": 64},  # all that it has
    }
    write_evaluation(run, Evaluation(step=12, tasks=tasks, details=measured))
    return run


@pytest.fixture(scope="module")
def told_card(told_run: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "verify_export", lambda loaded, folder: export.ExportComparison("Class", 1, 0.0))
        folder = export.export_model(str(told_run), say=lambda line: None)
    assert (folder / "loss.png").read_bytes() == b"PNG"
    return (folder / "README.md").read_text()


def test_the_hubs_own_parser_reads_the_metadata_and_writes_it_alike(told_card: str):
    card: Any = ModelCard(told_card)  # whose data pyright takes for those of any kind of card
    assert card.data.language == ["en", "no"]
    assert card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["smoltrain", "text-generation", "pytorch", "safetensors", "llama"]
    assert card.data.model_name == "quickstart"
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results or []}
    held_out = "documents held out of the training data"
    part = "arc|easy, first 10 documents"
    group = "mmlu, first 10 documents of each of its tasks"
    assert found == {
        (held_out, "loss"): 7.0, (part, "acc"): 0.25, (part, "acc_norm"): 0.5, (group, "acc"): 0.5,
        ("piqa", "acc"): 0.75,
    }  # fmt: skip
    assert card.content == told_card


def test_results_samples_and_curve_stand_in_the_card(told_card: str):
    assert r"| arc\|easy, first 10 documents | acc | 0.2500 ± 0.0100 |" in told_card
    assert "| piqa | acc | 0.7500 |" in told_card
    assert "![Training and validation loss over the steps of the run](loss.png)" in told_card
    assert f"\n`````text\nThe {SAMPLE}\n`````\n" in told_card, "a fence that nothing in the sample can close"
    assert "\nolder\n" not in told_card
    assert told_card.count("<script>") == 1
    assert "| licence | apache-2.0 |" in told_card
    assert "## Limits" in told_card


def test_the_card_of_another_step_has_no_results_of_this_one(told_run: Path):
    loaded = load_trained_model(str(told_run), 8)
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    source = ExportSource("quickstart", "", 8, 12)
    card = build_model_card(loaded, about, source, ExportSection(), has_curve=False)
    assert "unfinished: step 8 of 12" in card
    assert "0.2500" not in card
    assert "loss.png" not in card
    assert "\nolder\n" in card, "the samples of step 6"
    assert "license" not in ModelCard(card).data.to_dict()


def test_the_datasets_are_those_of_the_hub_that_a_phase_has_trained_on(tmp_path: Path):
    config = tiny.load(tmp_path)
    sources = [{"name": name, "weight": 1.0, "hub": f"me/{name}"} for name in ("web", "books")]
    data = DataSection.model_validate({"sources": sources})
    mixed = [phase.model_copy(update={"mix": {"books": 1.0}}) for phase in config.phases]
    assert _hub_datasets(config.model_copy(update={"data": data}), None) == ["me/web", "me/books"]
    own: Config = config.model_copy(update={"data": data, "phases": tuple(mixed)})
    assert _hub_datasets(own, None) == ["me/books"]


def test_what_a_later_phase_would_train_on_is_not_told_of_an_earlier_step(tmp_path: Path):
    config = tiny.load(tmp_path)
    sources = [{"name": name, "weight": 1.0, "hub": f"me/{name}"} for name in ("web", "books")]
    data = DataSection.model_validate({"sources": sources})
    first, *_ = config.phases
    books = first.model_copy(update={"mix": {"books": 1.0}, "lr": 0.25})
    both = first.model_copy(update={"name": "both", "lr": 0.5})
    changing: Config = config.model_copy(update={"data": data, "phases": (books, both)})
    end = first.num_steps
    for step, datasets, peak in ((end, ["me/books"], "0.25"), (end + 1, ["me/web", "me/books"], "0.5")):
        assert _hub_datasets(changing, step) == datasets
        assert _training_facts(changing, {}, step, 2 * end)["peak learning rate"] == peak


def test_a_loss_on_files_beside_the_dataset_is_none_on_the_dataset(tmp_path: Path):
    config = tiny.load(tmp_path)
    last = {"validation/loss_nats_per_token": 3.0}
    for more, named in (({}, "me/web"), ({"validation_path": "mine.txt"}, "held-out")):
        data = DataSection.model_validate({"hub": "me/web"} | more)
        text = write_card_metadata("m", "llama", ExportSection(), config.model_copy(update={"data": data}), last, None)
        card: Any = ModelCard(f"---\n{text}\n---\n")
        (result,) = card.data.eval_results
        assert result.dataset_type == named
