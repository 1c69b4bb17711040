"""What every key of a recipe is, read out of the schema: its type in plain words, default, unit, meaning.

One description of a key serves `smoltrain explain`, `smoltrain show --comments` and docs/config.md.
"""

import difflib
import functools
import inspect
import json
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from smoltrain.config.keys import suggest_key
from smoltrain.config.schema import MAX_INT, Config, MixedSource, PhaseSection, Section, SourceSection, Unit

NAME = "NAME"  # in a key, stands for the name of a phase or source
REQUIRED = "must be given"
# Sections that are lists: their items are addressed by name.
ITEM_SECTIONS: dict[str, type[Section]] = {"phases": PhaseSection, "data.sources": MixedSource}


@dataclass(frozen=True)
class KeyReference:
    """One key of a recipe."""

    key: str  # dotted, as the command line takes it, with NAME for the name of a phase or source
    type: str  # in plain words, with choices, bounds and unit
    default: str  # as a recipe would say it, or REQUIRED
    meaning: str
    is_inherited: bool = False  # an item of data.sources has the keys of `data` that describe a source

    @property
    def section(self) -> str:
        """'phases' for phases.NAME.lr."""
        return self.key.rpartition(".")[0].removesuffix(f".{NAME}")

    @property
    def leaf(self) -> str:
        """'lr' for phases.NAME.lr."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True)
class SectionReference:
    """One section of a recipe and its keys, in the schema's order."""

    name: str
    text: str
    keys: tuple[KeyReference, ...]

    @property
    def sentence(self) -> str:
        """The first sentence of its text."""
        return self.text.partition(". ")[0].rstrip(".") + "."


@functools.cache
def read_sections() -> dict[str, SectionReference]:
    """Every section by its name, in the schema's order; the items of data.sources are a section behind `data`."""
    sections: dict[str, SectionReference] = {}
    for name, field in Config.model_fields.items():
        classes = [ITEM_SECTIONS[name]] if name in ITEM_SECTIONS else _section_classes(field.annotation)
        sections[name] = _describe_section(name, classes)
        for items in ITEM_SECTIONS.keys() - sections:
            if items.startswith(f"{name}."):
                sections[items] = _describe_section(items, [ITEM_SECTIONS[items]])
    return sections


def read_keys() -> list[KeyReference]:
    """Every key of every section."""
    return [key for section in read_sections().values() for key in section.keys]


def find_key_references(word: str) -> list[KeyReference]:
    """The keys that a word names: a dotted key, also with the name of a phase, or the last part of some keys."""
    parts = word.split(".")
    exact = [key for key in read_keys() if parts in _spellings(key, parts)]
    if exact or len(parts) > 1:
        return exact
    return [key for key in read_keys() if key.leaf == word and not key.is_inherited]


def suggest_key_reference(word: str) -> str:
    """What to want instead of a word that names no key and no section."""
    section, dot, _ = word.partition(".")
    leaf = word.rpartition(".")[2]
    near = [] if dot else difflib.get_close_matches(word, read_sections(), n=1, cutoff=0.8)
    if near:
        return near[0]
    siblings = {key.leaf: key.key for key in read_keys() if dot and key.key.startswith(f"{section}.")}
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.8)
    if near:
        return siblings[near[0]]
    meant = suggest_key(word)
    if meant:
        return meant.replace(".*.", f".{NAME}.")
    return f"a section ({', '.join(read_sections())}) or one of its keys"


def describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in plain words: 'whole number of steps, 0 or more', 'auto, on or off', 'text or null'."""
    choices = list(_list_choices(annotation, list(metadata)))
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]


def format_default(value: Any) -> str:
    """A value as a recipe says it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str | Path) and str(value):
        return str(value)
    return json.dumps(value)


def _spellings(key: KeyReference, parts: list[str]) -> list[list[str]]:
    """The key as it may be written: the name of a phase or source for NAME, or nothing at all."""
    pattern = key.key.split(".")
    if NAME not in pattern:
        return [pattern]
    named = [part if place == NAME else place for part, place in zip(parts, pattern, strict=False)]
    return [named if len(parts) == len(pattern) else pattern, [place for place in pattern if place != NAME]]


def _section_classes(annotation: Any) -> list[type[Section]]:
    """The classes that a section is read as: more than one where a key says which."""
    if isinstance(annotation, type):
        return [annotation]
    return [
        section for argument in get_args(annotation) for section in _section_classes(argument) if _is_section(section)
    ]


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Section)


def _describe_section(name: str, classes: list[type[Section]]) -> SectionReference:
    """A section; what another class than its first one adds says with which kind it goes."""
    keys: dict[str, KeyReference] = {}
    texts = []
    prefix = f"{name}.{NAME}" if name in ITEM_SECTIONS else name
    for number, section in enumerate(classes):
        text = inspect.cleandoc(section.__doc__ or "")
        (kind,) = get_args(section.model_fields["kind"].annotation) if len(classes) > 1 else ("",)
        texts.append(f"With kind: {kind}: {text}" if number else text)
        for field_name, field in section.model_fields.items():
            leaf = field.alias or field_name
            is_inherited = section is MixedSource and field_name in SourceSection.model_fields
            key = _describe_key(f"{prefix}.{leaf}", field, is_inherited=is_inherited)
            if leaf not in keys:
                only = f"; only with kind: {kind}" if number else ""
                keys[leaf] = replace(key, meaning=key.meaning + only)
            elif keys[leaf].type != key.type:
                keys[leaf] = replace(keys[leaf], type=f"{keys[leaf].type} or {key.type}")
    return SectionReference(name, " ".join(" ".join(texts).split()), tuple(keys.values()))


def _describe_key(key: str, field: FieldInfo, *, is_inherited: bool) -> KeyReference:
    default = REQUIRED if field.is_required() else format_default(field.default)
    meaning = " ".join((field.description or "").split())
    return KeyReference(key, describe_type(field.annotation, field.metadata), default, meaning, is_inherited)


def _list_choices(annotation: Any, metadata: list[Any]) -> Iterator[str]:
    """The alternatives of a type, each in plain words; `metadata` holds what bounds its numbers."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            item for extra in arguments[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])
        ]
        yield from _list_choices(arguments[0], [*metadata, *inner])
    elif origin in (Union, types.UnionType):
        for argument in sorted(arguments, key=lambda argument: argument is types.NoneType):
            yield from _list_choices(argument, metadata)
    elif origin is Literal:
        yield from map(str, arguments)
    elif origin is tuple:
        yield "list of sections" if _is_section(arguments[0]) else f"list of {describe_type(arguments[0])}s"
    elif origin is dict:
        yield "mapping" if arguments[1] is Any else f"mapping of names to {describe_type(arguments[1])}"
    elif annotation in (int, float):
        yield _describe_number(annotation, metadata)
    else:
        yield {bool: "true or false", types.NoneType: "null", str: "text", Path: "path"}[annotation]


def _describe_number(kind: type, metadata: list[Any]) -> str:
    """'whole number of steps from 1 to 1,000'; the bound of all whole numbers, MAX_INT, is left out."""
    words = ["whole number" if kind is int else "number"]
    words += [f"of {item}" for item in metadata if isinstance(item, Unit)]
    for item in metadata:
        match item:
            case Ge():
                words.append(f"from {_format_bound(item.ge)}")
            case Gt() if kind is int:
                words.append(f"from {_format_bound(item.gt + 1)}")  # pyright: ignore[reportOperatorIssue]
            case Gt():
                words.append(f"above {_format_bound(item.gt)}")
            case Le() if item.le != MAX_INT:
                words.append(f"to {_format_bound(item.le)}")
            case Lt():
                words.append(f"to below {_format_bound(item.lt)}")
            case _:
                pass
    return " ".join(words)


def _format_bound(value: Any) -> str:
    """A number, large ones next to a power of two as that: 2^63 - 1."""
    if isinstance(value, int) and value > MAX_INT and value.bit_count() == value.bit_length():
        return f"2^{value.bit_length()} - 1"
    return f"{value:,}"
