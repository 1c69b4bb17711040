"""The reference of the keys: complete, in plain words, found by what people type."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from smoltrain.checkpoint.identity import KEY_RULES
from smoltrain.config.load import load_config, read_yaml
from smoltrain.config.reference import (
    NAME,
    REQUIRED,
    describe_type,
    find_key_references,
    format_default,
    read_keys,
    read_sections,
    suggest_key_reference,
)
from smoltrain.config.schema import MAX_INT, MAX_SEED, Config, MixedSource, Seconds, Steps

EXAMPLE = Path(__file__).parents[1] / "example.yaml"


def test_every_key_of_the_schema_is_there_once():
    keys = [key.key.replace(NAME, "*") for key in read_keys()]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(KEY_RULES) | {"data.sources"}  # tests/checkpoint/test_identity.py compares with the schema


def test_every_key_and_section_says_what_it_is():
    assert [section.name for section in read_sections().values() if not section.text] == []
    assert [key.key for key in read_keys() if len(key.meaning) < 10] == []
    assert set(read_sections()) == {*Config.model_fields, "data.sources"}


@pytest.mark.parametrize(
    ("annotation", "metadata", "words"),
    [
        (bool, [], "true or false"),
        (Path, [], "path"),
        (str | None, [], "text or null"),
        (None | str, [], "text or null"),
        (int, [Gt(0), Le(1000)], "whole number from 1 to 1,000"),
        (int, [Ge(0), Le(MAX_INT)], "whole number from 0"),
        (int, [Ge(0), Le(MAX_SEED)], "whole number from 0 to 2^63 - 1"),
        (float, [Gt(0)], "number above 0"),
        (float, [Ge(0), Lt(0.5)], "number from 0 to below 0.5"),
        (float, [], "number"),
        (Steps, [Ge(16)], "whole number of steps from 16"),
        (Seconds | None, [Gt(0)], "number of seconds above 0 or null"),
        (Literal["a"], [], "a"),
        (Literal["auto", "on", "off"], [], "auto, on or off"),
        (Literal["auto"] | Annotated[Steps, Field(gt=0, le=9)], [], "auto or whole number of steps from 1 to 9"),
        (tuple[str, ...], [], "list of texts"),
        (tuple[MixedSource, ...], [], "list of sections"),
        (dict[str, Any], [], "mapping"),
        (dict[str, Annotated[float, Field(gt=0)]] | None, [], "mapping of names to number above 0 or null"),
    ],
)
def test_types_in_plain_words(annotation: Any, metadata: list[Any], words: str):
    assert describe_type(annotation, metadata) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "null"), (True, "true"), (0.95, "0.95"), (1e-8, "1e-08"), (10000.0, "10000"), (7, "7"), ("", '""')),
        *(("auto", "auto"), (Path("runs"), "runs"), (("",), '[""]'), ((), "[]"), ({}, "{}")),
    ],
)
def test_a_default_is_written_as_in_a_recipe(value: object, text: str):
    assert format_default(value) == text


def test_a_default_is_what_a_recipe_gets_that_does_not_say(tmp_path: Path):
    given = read_yaml(EXAMPLE)
    dumped = load_config(str(EXAMPLE)).model_dump(mode="json")
    checked = 0
    for key in read_keys():
        section, leaf = key.section, key.leaf
        if NAME in key.key or leaf in given.get(section, {}) or leaf not in dumped[section] or section == "run":
            continue
        value = dumped[section][leaf]
        assert key.default == format_default(tuple(value) if isinstance(value, list) else value), key.key
        checked += 1
    assert checked > 60
    assert {key.key for key in read_keys() if key.default == REQUIRED} > {"tokenizer.name", "batch.micro_batch"}


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("evaluate.every", ["evaluate.every"]),
        ("phases.main.lr", ["phases.NAME.lr"]),
        ("phases.lr", ["phases.NAME.lr"]),
        ("phases.*.lr", ["phases.NAME.lr"]),
        ("lr", ["phases.NAME.lr"]),
        ("data.sources.web.path", ["data.sources.NAME.path"]),
        ("path", ["data.path"]),  # of a source of many it is the same key
        ("every", ["evaluate.every", "sample.every", "checkpoint.every"]),
        ("vocab_size", ["model.vocab_size", "tokenizer.vocab_size"]),
        ("init.from", ["init.from"]),
        ("init.source", []),
        ("optimizer.lr", []),
        ("phases.main.lr.x", []),
        ("stps", []),
        ("", []),
    ],
)
def test_keys_are_found_by_what_people_type(word: str, keys: list[str]):
    assert [key.key for key in find_key_references(word)] == keys


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("stps", "phases.NAME.steps"),
        ("optimizer.lr", "phases.NAME.lr"),
        ("checkpoints", "checkpoint"),
        ("modle", "model"),
        ("model.vocab_sise", "model.vocab_size"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(word: str, want: str):
    assert suggest_key_reference(word) == want


def test_a_word_that_is_like_no_key_is_answered_with_the_sections():
    assert suggest_key_reference("zzz").startswith("a section (run, init, model, ")


def test_what_only_one_kind_of_model_has_says_so():
    meanings = {key.leaf: key.meaning for key in read_sections()["model"].keys}
    assert meanings["model_type"].endswith("; only with kind: transformers")
    assert "only with kind" not in meanings["hidden_size"] + meanings["vocab_size"]
