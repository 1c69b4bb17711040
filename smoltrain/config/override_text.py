"""A program's values for a recipe's keys, as the `section.key=value` texts that the command line knows."""

import json
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smoltrain.config.yaml_text import parse_override_value
from smoltrain.errors import Problem, UserError, format_value

RAW_IN_JSON_ALONE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


def format_overrides(overrides: Sequence[str] | Mapping[str, Any], sections: Mapping[str, Any]) -> list[str]:
    """Texts stay as they are; mappings of values, however deep, become one text for each key.

    Errors: UserError for a key that is no text, and a value that no recipe can hold.
    """
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise UserError(Problem("overrides are not a list", format_value(overrides), "a list or mapping", "overrides"))
    if not isinstance(overrides, Mapping):
        words = list(overrides)
        for word in words:
            if not isinstance(word, str):
                raise UserError(Problem("an override is no text", format_value(word), "section.key=value", "overrides"))
        return [*words, *_format_tree(sections, "")]
    return [*_format_tree(overrides, ""), *_format_tree(sections, "")]


def _format_tree(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if not isinstance(name, str):
            raise UserError(Problem("a key is no text", format_value(name), "text", key))
        if isinstance(value, Mapping) and value:
            yield from _format_tree(value, f"{key}.")
        else:
            yield f"{key}={_format_value_text(value, key)}"


def _format_value_text(value: Any, key: str) -> str:
    """The text that `parse_override_value` reads as this value."""
    plain = _plain_value(value, key)
    if isinstance(plain, str) and parse_override_value(plain) == plain:
        return plain
    text = json.dumps(plain, ensure_ascii=False)  # JSON is YAML, but for characters that YAML takes raw in no text
    return RAW_IN_JSON_ALONE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain_value(value: Any, key: str) -> Any:
    """Of the types that JSON has; numpy's numbers among them. Errors: UserError."""
    match value:
        case None | bool() | str():
            return value
        case Path():
            return str(value)
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value)
        case list() | tuple():
            return [_plain_value(item, key) for item in value]
        case Mapping():
            return {str(name): _plain_value(item, key) for name, item in value.items()}
    want = "a number, text, path, true, false, none, or a list or mapping of these"
    raise UserError(Problem(f"{key} cannot have such a value", format_value(value), want, key))
