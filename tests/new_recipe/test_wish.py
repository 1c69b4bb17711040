"""What the options of `smoltrain new` mean; tests/new_recipe/test_write.py has the mistakes."""

from pathlib import Path

import pytest

from smoltrain.config.schema import DataSection
from smoltrain.new_recipe.wish import OPTIONS, PLAYS, RecipeWish, TextOptions, check_wish, option_of_key


def wish(text: TextOptions, device: str = "h100") -> RecipeWish:
    return check_wish("tiny", "20M", tokens="400K", hours=None, device=device, world=None, text=text)


def test_without_a_text_it_is_the_plays():
    found = wish(TextOptions())
    assert (found.data, found.has_own_text) == (PLAYS, False)
    assert (found.num_parameters, found.tokens) == (20_000_000, 400_000)


def test_the_ranks_are_those_that_the_command_would_start():
    assert wish(TextOptions()).world == 1
    assert wish(TextOptions(), device="cpu").world == 2


def test_paths_begin_at_the_root_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = wish(TextOptions(data="train.txt", validation="s3://bucket/valid.txt"))
    assert found.data == DataSection(path=str(tmp_path / "train.txt"), validation_path="s3://bucket/valid.txt")
    assert found.has_own_text


def test_with_a_dataset_of_the_hub_a_split_is_held_out():
    found = wish(TextOptions(hub="me/texts", hub_config="en", text_field="body", validation="test"))
    assert found.data == DataSection(hub="me/texts", hub_config="en", text_field="body", validation_split="test")


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ("data.path", "--data"),
        ("data.path or data.pattern", "--data"),
        ("data.path or validation_path", "--data or --validation"),
        ("data.validation_path", "--validation"),
        ("data.hub", "--hub"),
        ("data.hub_config", "--hub-config"),
        ("data.hub, data.hub_config or data.hub_split", "--hub or --hub-config"),
        ("data.validation_split", "--validation"),
        ("data.text_field, or /texts/a.parquet", "--text-field"),
        ("/texts/a.parquet", "/texts/a.parquet"),
    ],
)
def test_what_is_to_be_changed_is_an_option(change: str, option: str):
    assert option_of_key(change) == option


def test_a_longer_place_is_looked_for_before_its_beginning():
    keys = list(OPTIONS)
    for number, key in enumerate(keys):
        assert not any(key.startswith(before) for before in keys[:number]), key
