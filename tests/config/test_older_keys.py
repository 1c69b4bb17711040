"""Keys of earlier versions: read in what a run wrote, refused in what a person types."""

from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.keys import list_keys, suggest_key
from smoltrain.config.load import config_to_yaml, load_config, read_run_config
from smoltrain.config.older_keys import NEWER_KEYS, RENAMED_KEYS, update_sections, update_values
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


LATER = {name: NEWER_KEYS[f"optimizer.{name}"] for name in ("momentum", "newton_schulz_steps", "embedding_lr_factor")}


@pytest.mark.parametrize(
    ("section", "updated"),
    [
        ({"name": "adamw", "beta1": 0.8}, {"kind": "adamw", "beta1": 0.8, **LATER}),
        ({"kind": "muon", "momentum": 0.9}, LATER | {"kind": "muon", "momentum": 0.9}),
        ({"name": "x", "kind": "muon"}, {"name": "x", "kind": "muon", **LATER}),  # nobody wrote that
        ({"beta1": 0.8}, {"beta1": 0.8, "kind": "adamw", **LATER}),
    ],
)
def test_a_section_is_as_this_version_would_have_written_it(section: dict[str, Any], updated: dict[str, Any]) -> None:
    tree = {"run": {"name": "adamw"}, "optimizer": dict(section)}
    update_sections(tree)
    assert tree == {"run": {"name": "adamw"}, "optimizer": updated}
    values = {"run.seed": 1, "tokenizer.name": "bpe"} | {f"optimizer.{key}": value for key, value in section.items()}
    expected = {"run.seed": 1, "tokenizer.name": "bpe"} | {f"optimizer.{key}": value for key, value in updated.items()}
    assert update_values(values) == expected


@pytest.mark.parametrize("tree", [{"optimizer": "muon"}, {"optimizer": None}, {}])
def test_what_is_no_section_stays(tree: dict[str, Any]) -> None:
    before = dict(tree)
    update_sections(tree)
    assert tree == before


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
