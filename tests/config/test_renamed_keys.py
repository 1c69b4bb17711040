"""Old names of keys: read in what a run wrote, refused in what a person types."""

from pathlib import Path
from typing import Any

import pytest

from smoltrain.checkpoint.identity import NEWER_KEYS
from smoltrain.config.keys import list_keys, suggest_key
from smoltrain.config.load import config_to_yaml, load_config, read_run_config
from smoltrain.config.renamed_keys import RENAMED_KEYS, rename_old_fields, rename_old_keys
from smoltrain.errors import UserError
from tests import tiny


def test_every_new_name_is_a_key_and_every_old_one_is_none() -> None:
    keys = set(list_keys())
    assert RENAMED_KEYS
    assert set(RENAMED_KEYS.values()) <= keys
    assert RENAMED_KEYS.keys() & keys == set()
    for old, new in RENAMED_KEYS.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0], "a renamed key stays in its section"
        assert suggest_key(old, None, "x") == f"{new}=x", "config/aliases.py answers who types it"


def test_newer_keys_have_the_value_that_they_have_today(tmp_path: Path) -> None:
    """Else a run that was written before them could not go on under the recipe that it began with."""
    tree: Any = load_config("smollm2-135m").model_dump()
    for key, before in NEWER_KEYS.items():
        section, name = key.split(".")
        assert tree[section][name] == before


@pytest.mark.parametrize(
    ("values", "renamed"),
    [
        ({"run.seed": 1, "optimizer.name": "adamw"}, {"run.seed": 1, "optimizer.kind": "adamw"}),
        ({"optimizer.kind": "muon"}, {"optimizer.kind": "muon"}),
        ({"optimizer.kind": "muon", "optimizer.name": "x"}, {"optimizer.kind": "muon", "optimizer.name": "x"}),
        ({"run.name": "adamw", "tokenizer.name": "bpe"}, {"run.name": "adamw", "tokenizer.name": "bpe"}),
        ({}, {}),
    ],
)
def test_values_by_dotted_key(values: dict[str, Any], renamed: dict[str, Any]) -> None:
    assert rename_old_keys(values) == renamed


@pytest.mark.parametrize(
    ("tree", "renamed"),
    [
        ({"optimizer": {"name": "adamw", "beta1": 0.8}}, {"optimizer": {"kind": "adamw", "beta1": 0.8}}),
        ({"optimizer": {"name": "x", "kind": "muon"}}, {"optimizer": {"name": "x", "kind": "muon"}}),
        ({"run": {"name": "adamw"}}, {"run": {"name": "adamw"}}),
        ({"optimizer": "muon"}, {"optimizer": "muon"}),
        ({"optimizer": None}, {"optimizer": None}),
        ({}, {}),
    ],
)
def test_fields_of_a_tree(tree: dict[str, Any], renamed: dict[str, Any]) -> None:
    rename_old_fields(tree)
    assert tree == renamed
    assert [list(section) for section in tree.values() if isinstance(section, dict)] == [
        list(section) for section in renamed.values() if isinstance(section, dict)
    ]


def test_a_config_that_an_earlier_version_wrote_is_read_and_a_recipe_is_not(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path, "optimizer.beta2=0.9")
    written = tmp_path / "config.yaml"
    text = config_to_yaml(settings).replace("\n  kind: adamw\n", "\n  name: adamw\n")
    written.write_text(text + "provenance: {run_id: x}\n", encoding="utf-8")
    assert "name: adamw" in text
    assert read_run_config(written) == settings
    assert load_config(written).optimizer == settings.optimizer, "a run's own config.yaml is a recipe too"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown key optimizer\.name: saw 'name', want optimizer\.kind; change"):
        load_config(recipe)
