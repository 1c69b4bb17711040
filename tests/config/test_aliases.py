"""The words of other trainers: none hides a key, and none leads to a key that there is not."""

import re
from pathlib import Path

from smoltrain.config.aliases import ALIAS_TABLE, ALIASES, NO_KEY, SWITCHES, VALUE_WORDS
from smoltrain.config.keys import list_keys, list_sections, suggest_key
from smoltrain.config.load import RECIPES_FOLDER
from smoltrain.config.yaml_text import read_yaml

EXAMPLE = read_yaml(Path(__file__).parents[1] / "example.yaml")
LLAMA = read_yaml(RECIPES_FOLDER / "smollm2-135m-hf.yaml")
SECTIONS = "|".join(list_sections()[""])
NAMED = re.compile(rf"(?<![\w.])(?:{SECTIONS})(?:\.[\w*-]+)+")


def test_no_word_stands_twice():
    assert len(ALIASES) == sum(len(words.split()) for words, _ in ALIAS_TABLE)


def test_no_word_hides_a_key():
    keys = set(list_keys())
    assert ALIASES.keys() & (keys | {key.rpartition(".")[2] for key in keys}) == set()


def test_every_answer_names_keys_that_there_are():
    keys = set(list_keys())
    for answer in ALIASES.values():
        named = NAMED.findall(answer)
        assert named or answer.startswith(NO_KEY)
        assert set(named) <= keys


def test_every_word_is_answered_with_keys_of_the_recipe():
    for tree in (EXAMPLE, LLAMA):
        keys = set(list_keys(tree))
        for word in ALIASES:
            answer = suggest_key(word, tree, "1")
            assert answer is not None
            assert "{" not in answer
            named = [key for key in NAMED.findall(answer) if not key.startswith("model.config.")]
            assert set(named) <= keys


def test_switches_and_values_are_those_of_the_table():
    assert ALIASES.keys() >= SWITCHES
    assert all(word == word.lower() for word in [*ALIASES, *VALUE_WORDS])
