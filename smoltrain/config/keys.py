"""Which key a person means: a short one, a word of another trainer (aliases.py), or a slip of the keyboard.

A key is short for another one if it is what is left of that one when parts before its last are dropped, and of no
other: `seed` for run.seed, `main.lr` for phases.main.lr, and `lr` or `phases.lr` where there is one phase. A section
with a plain value is short for the key that says what the section is: `optimizer` for optimizer.kind.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

from smoltrain.config.aliases import ALIASES, NO_KEY, SWITCHES, VALUE_WORDS
from smoltrain.config.schema import (
    MODEL_SECTIONS,
    Config,
    MixedSource,
    ModelSection,
    PhaseSection,
    Section,
    TransformersSection,
    model_kind,
)
from smoltrain.config.yaml_text import parse_override_value
from smoltrain.errors import Problem, UserError

NEAR = 0.75  # of difflib's ratio: between words of all sections, where less would take any word for any other
NEAR_SIBLING = 0.5  # between keys of one section, which few are to be confused with
NEAR_SECTION = 0.85  # of a word without a section, which is a key more often
MAX_SHOWN_VALUE = 60  # characters
OVERRIDE = re.compile(r"[\w.-]+=")  # how one begins
# Sections -> the key that a plain value is for. `tokenizer: NAME` can be said in a file as well (schema.py), and leaves
# nothing of the recipe's section; what else a recipe says of its optimizer stays.
PLAIN_SECTIONS = {"optimizer": "optimizer.kind"}
YES_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def list_sections(tree: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """The keys below each dotted section, '' being the top: of a recipe's plain values, phases and sources by name.

    Without a recipe the phases and sources are called `*`, as phases are where it has none, and the model has the keys
    of either kind.
    """
    sections: dict[str, list[str]] = {"": _field_names(Config)}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections[name] = _field_names(field.annotation)
    if tree is None:
        sections["model"] = list(dict.fromkeys(_field_names(ModelSection) + _field_names(TransformersSection)))
    else:
        model = tree.get("model")
        kind = model_kind(model)
        sections["model"] = _field_names(MODEL_SECTIONS[kind])
        own = model.get("config") if isinstance(model, dict) and kind == "transformers" else None
        if isinstance(own, dict):
            sections["model.config"] = [str(key) for key in own]
    for name in _item_names(tree, "phases") or ["*"]:
        sections[f"phases.{name}"] = _field_names(PhaseSection)
    for name in _item_names(tree, "data", "sources"):
        sections[f"data.sources.{name}"] = _field_names(MixedSource)
    return sections


def list_keys(tree: Mapping[str, Any] | None = None) -> list[str]:
    """Every dotted key below a section, as `list_sections` has them."""
    return [f"{section}.{key}" for section, keys in list_sections(tree).items() if section for key in keys]


def find_full_keys(short: str, tree: Mapping[str, Any] | None = None) -> list[str]:
    """All keys that `short` may be short for; itself alone if it is one."""
    keys = list_keys(tree)
    if short in keys or short in Config.model_fields:
        return [short]
    return [key for key in keys if _is_short_for(short.split("."), key.split("."))]


def expand_override(override: str, tree: Mapping[str, Any]) -> str:
    """`key=value` with the full key, if the key is short for exactly one of this recipe; else as it was."""
    key, equals, value = override.partition("=")
    if not equals:
        return override
    if key in PLAIN_SECTIONS and isinstance(parse_override_value(value), str):
        return f"{PLAIN_SECTIONS[key]}={value}"
    keys = find_full_keys(key, tree)
    return f"{keys[0]}={value}" if len(keys) == 1 and "*" not in keys[0] else override


def suggest_key(key: str, tree: Mapping[str, Any] | None = None, value: object = None) -> str | None:
    """What to want instead of a key that there is not: the keys that are meant, with the value; None if none is near.

    `value` is what was typed for it, if that is known.
    """
    *parents, last = key.lower().replace("-", "_").split(".")
    section = ".".join(key.split(".")[:-1])
    siblings = list_sections(tree).get(section, [])  # without a section: the sections
    cutoff = NEAR_SIBLING if section else NEAR_SECTION
    sibling = difflib.get_close_matches(last, siblings, n=1, cutoff=cutoff)
    if ".".join([*parents, last]) in ALIASES:
        return _fill_answer(ALIASES[".".join([*parents, last])], key, tree, value)
    keys = find_full_keys(last, tree)
    if keys and not (sibling and len({full.partition(".")[0] for full in keys}) > 1):
        return _join_keys(keys, value)
    if last in ALIASES:
        return _fill_answer(ALIASES[last], key, tree, value)
    if tree is not None and model_kind(tree.get("model")) == "transformers" and last in ModelSection.model_fields:
        return f"model.config.{last}{_show_value(value)}"
    if sibling:
        return f"{sibling[0]!r} (the nearest valid one)"
    if last in TransformersSection.model_fields:
        return f"model.{last}, with model.kind=transformers"
    words = {full.rpartition(".")[2] for full in list_keys(tree)} | ALIASES.keys()
    near = difflib.get_close_matches(last, sorted(words), n=1, cutoff=NEAR)
    return suggest_key(near[0], tree, value) if near else None


def is_word_of_recipes(word: str, tree: Mapping[str, Any] | None = None) -> bool:
    """Whether a word without dots is the end of a key, or what another trainer calls one."""
    return bool(find_full_keys(word, tree)) or word in ALIASES


def read_key_options(words: list[str], own_options: Mapping[str, bool] = {}) -> list[str]:
    """Words of a command line in which `--key value` and `--key=value` have become `key=value`, hyphens underscores.

    `own_options` are the options of the command itself, and whether a value follows them. They stay, and so does what
    is nearer to one of them than to any key. What came before the first plain word, a recipe, stands behind it.
    Errors: UserError for an option without its value.
    """
    rest = list(words)
    found: list[str] = []
    leading: list[str] = []
    has_plain_word = False
    while rest and rest[0] != "--":
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option in own_options:
            found.append(word)
            if own_options[option] and not equals and rest:
                found.append(rest.pop(0))
        elif not option.startswith("--") or _is_misspelt_option(option, own_options):
            found.append(word)
            if not has_plain_word and not word.startswith("-") and not OVERRIDE.match(word):
                has_plain_word = True
                found += leading
        else:
            *parents, last = option.removeprefix("--").split(".")
            last = last.replace("-", "_")
            negated = last.removeprefix("no_")
            if not equals and negated != last and bool in _annotations(negated):  # as argparse's BooleanOptionalAction
                last = negated
                value = "false"
            elif not equals:
                value = _take_value(last, rest, own_options, option)
            key = ".".join([*parents, last])
            (found if has_plain_word else leading).append(f"{key}={value}")
    return [*found, *([] if has_plain_word else leading), *rest]


def _is_misspelt_option(option: str, own_options: Mapping[str, bool]) -> bool:
    """Whether an option is no word of a recipe, but nearly one of the command's own."""
    name = option.removeprefix("--").replace("-", "_")
    if is_word_of_recipes(name.rpartition(".")[2]):
        return False
    known = [own.lstrip("-").replace("-", "_") for own in own_options]
    return bool(difflib.get_close_matches(name, known, n=1, cutoff=NEAR))


def _annotations(last: str) -> list[Any]:
    """The types of all keys that end so."""
    return [field.annotation for name, field in _list_fields() if name == last]


def _take_value(last: str, rest: list[str], own_options: Mapping[str, bool], option: str) -> str:
    """The value of an option, taken from the words behind it. Errors: UserError if there is none and it needs one.

    `last` is the last part of its key.
    """
    annotations = _annotations(last)
    is_switch = last in SWITCHES or bool in annotations
    has_word = bool(rest) and not (rest[0].startswith("--") or rest[0] in own_options or OVERRIDE.match(rest[0]))
    if has_word and (not is_switch or rest[0].lower() in YES_WORDS):
        return rest.pop(0)
    is_known = last in ALIASES or bool(annotations)
    if is_known and not is_switch and "Literal" not in str(annotations):  # whose choices the next error lists
        raise UserError(Problem(f"{option} has no value", "nothing behind it", f"{option}=VALUE", "the command line"))
    return "true"


def _list_fields() -> list[tuple[str, FieldInfo]]:
    """Every field of the schema, by the last part of its key."""
    sections: list[type[Section]] = [ModelSection, TransformersSection, PhaseSection, MixedSource]
    for field in Config.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections.append(field.annotation)
    return [(field.alias or name, field) for section in sections for name, field in section.model_fields.items()]


def _field_names(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _item_names(tree: Mapping[str, Any] | None, *path: str) -> list[str]:
    """The names of the items of a list in a recipe's plain values; `*` without a recipe."""
    if tree is None:
        return ["*"]
    node: Any = tree
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    items = node if isinstance(node, list | tuple) else []
    return [str(item["name"]) for item in items if isinstance(item, Mapping) and "name" in item]


def _is_short_for(short: list[str], full: list[str]) -> bool:
    """Whether dropping parts of a full key, but not the last one, leaves the short one."""
    remaining = iter(full)
    return short[-1] == full[-1] and all(part in remaining for part in short)


def _join_keys(keys: list[str], value: object) -> str:
    """Keys as an answer: those of other phases in brackets, all others as equals."""
    shown = [f"{key}{_show_value(value)}" for key in keys]
    if len(shown) > 1 and all(key.startswith("phases.") for key in keys):
        return f"{shown[0]} (and {', '.join(shown[1:])})"
    return " or ".join(shown) if len(shown) < 3 else f"one of {', '.join(shown)}"


def _fill_answer(answer: str, key: str, tree: Mapping[str, Any] | None, value: object) -> str:
    """An answer of the alias table for this recipe and value."""
    if isinstance(value, str):
        value = VALUE_WORDS.get(value.lower(), value)
    shown = _show_value(value)
    if answer.startswith(NO_KEY) or "zero{value}" in answer:
        answer = answer.replace("{value}", shown.removeprefix("=") or "N")
    answer = answer.replace("={value}", shown)
    if tree is not None and model_kind(tree.get("model")) == "transformers":
        answer = re.sub(r"\bmodel\.(\w+)", _name_transformers_key, answer)
    names = _item_names(tree, "phases")
    own = key.split(".")[1:2]
    if key.startswith("phases.") and own[0] in names:
        names = own
    if not names:
        return answer
    return re.sub(r"phases\.\*\.(\w+)(=\S+(?<![,:;)]))?", lambda found: _name_phases(found, names), answer)


def _name_phases(found: re.Match[str], names: list[str]) -> str:
    keys = [f"phases.{name}.{found[1]}{found[2] or ''}" for name in names]
    return f"{keys[0]} (and {', '.join(keys[1:])})" if len(keys) > 1 else keys[0]


def _name_transformers_key(found: re.Match[str]) -> str:
    is_ours = found[1] in TransformersSection.model_fields
    return found[0] if is_ours else f"model.config.{found[1]}"


def _show_value(value: object) -> str:
    """`=value` as it can be typed again; nothing if it is unknown, or long."""
    if not isinstance(value, str) or not value or len(value) > MAX_SHOWN_VALUE or re.search(r"\s", value):
        return ""
    return f"={value}"
