"""A config with a comment above each key: the same config, and the same lines, with all that a key means."""

import itertools
from pathlib import Path

import pytest

from smoltrain.config.commented_yaml import WIDTH, config_to_commented_yaml
from smoltrain.config.load import config_to_yaml, list_recipes, load_config
from smoltrain.config.reference import read_keys

EXAMPLE = str(Path(__file__).parents[1] / "example.yaml")


def is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


@pytest.mark.parametrize("recipe", list_recipes())
def test_with_comments_a_recipe_is_the_same_recipe(recipe: str, tmp_path: Path):
    config = load_config(recipe)
    text = config_to_commented_yaml(config)
    path = tmp_path / "commented.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(str(path)) == config
    plain = config_to_yaml(config).splitlines()
    assert [line for line in text.splitlines() if not is_comment(line)] == plain
    assert [line for line in text.splitlines() if is_comment(line) and len(line) > WIDTH] == []


def test_every_key_has_its_meaning_above_it():
    lines = config_to_commented_yaml(load_config(EXAMPLE)).splitlines()
    uncommented = [line for above, line in itertools.pairwise(lines) if not is_comment(line) and not is_comment(above)]
    second_phase = lines[lines.index("- name: continuation") :]
    assert [line for line in uncommented if ":" in line and line not in second_phase] == []
    words = " ".join(line.strip(" #") for line in lines)
    for key in read_keys():
        if key.section in ("evaluate", "spikes", "phases"):
            assert f"{key.meaning} ({key.type}" in words, key.key


def test_only_the_first_phase_is_commented():
    lines = config_to_commented_yaml(load_config(EXAMPLE)).splitlines()
    start = lines.index("- name: continuation")
    end = lines.index("evaluate:")
    comments = [line for line in lines[start:end] if is_comment(line)]
    assert comments == ["# Loss on the held-out documents."]


def test_texts_that_look_like_comments_and_keys_come_back(tmp_path: Path):
    config = load_config(
        EXAMPLE, ['track.wandb_notes="# none\\nrun:\\n  seed: 2"', 'sample.prompts=["# a", "b: c", ""]']
    )
    path = tmp_path / "commented.yaml"
    path.write_text(config_to_commented_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


def test_sources_and_the_keys_of_a_transformers_model(tmp_path: Path):
    words = ["data.package=null", "data.sources=[{name: a, weight: 1, path: x}, {name: b, weight: 2, path: y}]"]
    config = load_config("smollm2-135m-hf", [*words, "data.path=null", "data.pattern=**/*"])
    path = tmp_path / "commented.yaml"
    path.write_text(config_to_commented_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "share of each step's rows" in lines[lines.index("    weight: 1.0") - 2]
    assert not is_comment(lines[lines.index("    weight: 2.0") - 1])
