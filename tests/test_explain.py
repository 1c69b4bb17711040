"""`smoltrain explain` and docs/config.md: what they say of sections and keys, and that the page is the schema's."""

import pytest

from docs.config_reference import PAGE, write_page
from smoltrain.checkpoint.identity import ANNOUNCED, FIXED, FIXED_IN_PAST_STEPS, FREE
from smoltrain.config.load import list_recipes, load_config
from smoltrain.config.reference import read_keys, read_sections
from smoltrain.errors import UserError
from smoltrain.explain import RESUME_WORDS, explain, list_explained_words


def test_the_page_is_written_from_the_schema():
    assert PAGE.read_text(encoding="utf-8") == write_page(), "anew: .venv/bin/python docs/config_reference.py"


def test_the_page_has_every_key_once_a_row():
    rows = [line for line in write_page().splitlines() if line.startswith("| `")]
    own = [key for key in read_keys() if not key.is_inherited]
    assert [row.split("`")[1] for row in rows] == [key.leaf for key in own]
    assert all(len(row.replace("\\|", "").split("|")) == 7 for row in rows), "a cell is cut by a bar"


def test_without_a_word_all_sections_are_told():
    answer = explain(None)
    assert [line.split()[0] for line in answer.splitlines() if line.startswith("  ") and line[2] != " "][1:] == list(
        read_sections()
    )


@pytest.mark.parametrize("width", [60, 80])
def test_every_answer_fits(width: int):
    for word in (None, *list_explained_words()):
        assert [line for line in explain(word, width).splitlines() if len(line) > width] == []


def test_a_section_tells_all_its_keys():
    for name, section in read_sections().items():
        words = " ".join(explain(name).split())
        for key in section.keys:
            assert key.leaf in words
            assert key.is_inherited or f"{key.leaf} {key.type}; " in words
            assert key.is_inherited or key.meaning in words


def test_a_key_is_told_whole():
    assert explain("evaluate.every=40", 200) == "\n".join(
        [
            "evaluate.every",
            "  meaning  how often the validation loss is measured; 0 never",
            "  type     whole number of steps from 0",
            "  default  0",
            *recipe_lines("evaluate", "every"),
            "  resume   may change; the start prints it, since numbers may come out otherwise from there on",
            "  section  evaluate: Loss on the held-out documents.",
        ]
    )


def recipe_lines(section: str, key: str) -> list[str]:
    places: dict[object, list[str]] = {}
    for recipe in list_recipes():
        value = getattr(getattr(load_config(recipe), section), key)
        places.setdefault(value, []).append(recipe)
    lines = [f"{value}: {', '.join(recipes)}" for value, recipes in places.items()]
    return [f"  {'' if number else 'recipes':9}{line}" for number, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("run.seed", FIXED),
        ("data.sources.web.weight", FIXED),
        ("phases.main.lr", FIXED_IN_PAST_STEPS),
        ("data.path", ANNOUNCED),
        ("run.name", FREE),
    ],
)
def test_a_key_tells_whether_a_resume_may_change_it(key: str, rule: str):
    assert RESUME_WORDS[rule][1] in " ".join(explain(key, 100).split())


def test_a_phases_values_are_told_by_phase_and_a_short_tokenizer_by_name():
    phases = load_config("quickstart").phases
    assert f"{phases[0].warmup_steps}: quickstart (main)" in explain("warmup_steps")
    assert "bpe: quickstart\n" in explain("tokenizer.name")
    assert "none of those shipped sets it" in explain("wandb_notes")


def test_a_word_that_several_sections_have_is_told_for_each():
    answers = explain("every").split("\n\n")
    assert [answer.splitlines()[0] for answer in answers] == ["evaluate.every", "sample.every", "checkpoint.every"]


@pytest.mark.parametrize(("word", "near"), [("phases.main.stps", "phases.NAME.steps"), ("tokeniser", "tokenizer")])
def test_a_misspelt_word_is_one_line(word: str, near: str):
    with pytest.raises(UserError, match=rf"^no such key or section: saw '{word}', want {near}; change"):
        explain(word)
