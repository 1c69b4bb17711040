"""Answers about the keys of a recipe, for `smoltrain explain`.

What the schema says of a key (config/reference.py), whether it may change at a resume (checkpoint/identity.py), and
what the shipped recipes set it to.
"""

import functools
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from smoltrain.checkpoint.identity import ANNOUNCED, FIXED, FIXED_IN_PAST_STEPS, FIXED_ROWS, FREE, key_rule
from smoltrain.config.load import list_recipes
from smoltrain.config.reference import (
    ITEM_SECTIONS,
    NAME,
    REQUIRED,
    KeyReference,
    SectionReference,
    find_key_references,
    read_keys,
    read_sections,
    suggest_key_reference,
)
from smoltrain.config.yaml_text import read_yaml
from smoltrain.errors import Problem, UserError

# A rule of a key -> in a word, and in a sentence.
RESUME_WORDS = {
    FIXED: ("fixed", "refused: with another value it would be another run"),
    FIXED_ROWS: ("rows", "may change as long as a step has as many rows over all ranks as before"),
    FIXED_IN_PAST_STEPS: ("future", "may change for the steps to come, not for those that are done"),
    ANNOUNCED: ("printed", "may change; the start prints it, since numbers may come out otherwise from there on"),
    FREE: ("free", "may change freely: nothing that was learned depends on it"),
}
LABEL = 9  # columns of what stands before the text about a key


def explain(word: str | None, width: int = 80) -> str:
    """All sections, or a section's keys, or what a key is; lines of at most `width` columns.

    `word` is a section, a dotted key (also with the name of a phase), or the last part of a key.
    Errors: UserError for any other word.
    """
    if word is None:
        return "\n".join(_explain_recipe(width))
    word = word.partition("=")[0].strip(".")
    if word in read_sections():
        return "\n".join(_explain_section(read_sections()[word], width))
    keys = find_key_references(word)
    if not keys:
        change = "the word behind `smoltrain explain`"
        raise UserError(Problem("no such key or section", repr(word), suggest_key_reference(word), change))
    return "\n\n".join("\n".join(_explain_key(key, width)) for key in keys)


def list_explained_words() -> list[str]:
    """Everything that can be asked for, for the shell's completion."""
    return [*read_sections(), *(key.key for key in read_keys())]


def _explain_recipe(width: int) -> Iterator[str]:
    yield from textwrap.wrap("A recipe has these sections, and a command line overrides their keys, as in", width)
    yield "  smoltrain train quickstart phases.main.lr=1e-3"
    yield ""
    column = max(map(len, read_sections())) + 2
    for section in read_sections().values():
        yield from _wrap(section.sentence, width, f"  {section.name:{column}}")
    yield ""
    yield from textwrap.wrap("smoltrain explain SECTION lists its keys; smoltrain explain KEY tells all of one.", width)


def _explain_section(section: SectionReference, width: int) -> Iterator[str]:
    yield from textwrap.wrap(f"{section.name}: {section.text}", width)
    own = [key for key in section.keys if not key.is_inherited]
    for key in own:
        yield ""
        yield from _wrap(f"{key.type}; {_say_default(key)}", width, f"  {key.leaf}  ")
        yield from _wrap(key.meaning, width, "      ")
    if len(own) < len(section.keys):
        yield ""
        inherited = ", ".join(key.leaf for key in section.keys if key.is_inherited)
        yield from textwrap.wrap(f"And, as in `data`, for this source alone: {inherited}.", width)
    yield ""
    place = f"{section.name}.{NAME}" if section.name in ITEM_SECTIONS else section.name
    example = f"{place}.{own[-1].leaf}"
    yield from textwrap.wrap(f"On the command line: {example}=VALUE. All of a key: smoltrain explain {example}", width)


def _explain_key(key: KeyReference, width: int) -> Iterator[str]:
    yield f"{key.key}"
    default = "none: it must be given" if key.default == REQUIRED else key.default
    yield from _wrap(key.meaning, width, f"  {'meaning':{LABEL}}")
    yield from _wrap(key.type, width, f"  {'type':{LABEL}}")
    yield from _wrap(default, width, f"  {'default':{LABEL}}")
    for number, text in enumerate(_say_recipe_values(key)):
        yield from _wrap(text, width, f"  {'' if number else 'recipes':{LABEL}}")
    yield from _wrap(RESUME_WORDS[key_rule(key.key)][1], width, f"  {'resume':{LABEL}}")
    section = f"{key.section}: {read_sections()[key.section].sentence}"
    yield from _wrap(section, width, f"  {'section':{LABEL}}")


def _say_default(key: KeyReference) -> str:
    return key.default if key.default == REQUIRED else f"default {key.default}"


def _wrap(text: str, width: int, label: str) -> list[str]:
    """The text behind a label, wrapped, its later lines below its first."""
    return textwrap.wrap(text, width, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)


def _say_recipe_values(key: KeyReference) -> list[str]:
    """'2.0e-3: quickstart (main)', a line for each value."""
    places: dict[str, list[str]] = {}
    for recipe, tree in _read_recipes().items():
        for item, value in _find_values(tree, key.key.split(".")):
            places.setdefault(_format_value(value), []).append(f"{recipe} ({item})" if item else recipe)
    if not places:
        return ["none of those shipped sets it"]
    return [f"{value}: {', '.join(names)}" for value, names in places.items()]


@functools.cache
def _read_recipes() -> dict[str, dict[str, Any]]:
    return {name: read_yaml(path) for name, path in list_recipes().items()}


def _find_values(tree: Any, parts: list[str]) -> Iterator[tuple[str, Any]]:
    """(name of the phase or source, or '', value) wherever a recipe sets a key."""
    section, *rest = parts
    if not isinstance(tree, dict) or section not in tree:
        return
    value: Any = tree[section]
    if section == "tokenizer" and isinstance(value, str):  # NAME for short
        value = {"name": value}
    if not rest:
        yield "", value
    elif rest[0] == NAME:
        for item in value:
            yield from ((item["name"], inner) for _, inner in _find_values(item, rest[1:]))
    else:
        yield from _find_values(value, rest)


def _format_value(value: Any) -> str:
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).strip()
    return "null" if value is None else str(value)
