"""YAML text to a tree of plain values and back, and `section.key=value` overrides put into it."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from smoltrain.errors import Problem, UserError, exception_message, format_value, suggest_choice

MAX_YAML_BYTES = 2**20  # bytes of a file: a recipe has some thousands, and PyYAML reads about 100,000 a second
MAX_YAML_VALUES = 100_000  # values in a file, an alias counted as often as it stands there
MAX_YAML_DEPTH = 50  # mappings and lists within each other
TOO_DEEP = f"its values lie more than {MAX_YAML_DEPTH} deep"
NULL_WORDS = ("", "~", "null", "Null", "NULL")  # of YAML 1.1
LINE_BREAKS = ("\r", "\x85", "\u2028", "\u2029")  # that YAML reads back as \n unless they are escaped


def read_yaml(path: Path, *, typed: bool = False) -> dict[str, Any]:
    """The mapping that a YAML file holds; its plain values are text, or with `typed` what YAML takes them for.

    Errors: UserError if it is not a file, too large or too deep to be a recipe, not YAML, or no mapping.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(Problem("the file cannot be read as YAML", "a folder, pipe or device", "a file", str(path)))
    try:
        size = path.stat().st_size
        if size > MAX_YAML_BYTES:
            want = f"at most {MAX_YAML_BYTES:,} bytes of YAML"
            raise UserError(Problem("the file is too large to be a recipe", f"{size:,} bytes", want, str(path)))
        content = path.read_bytes()
        _check_bracket_depth(content.decode("latin-1"))
        tree = yaml.load(content, _DepthLimitedLoader if typed else _PlainTextLoader)  # SafeLoaders
        _check_tree_size(tree)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        saw = f"line {line}: {' '.join(str(error.problem).split())}"
        raise UserError(Problem("the file cannot be read as YAML", saw, "valid YAML", str(path))) from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        saw = exception_message(error)
        raise UserError(Problem("the file cannot be read as YAML", saw, "valid YAML", str(path))) from None
    if not isinstance(tree, dict):
        saw = "nothing" if tree is None else format_value(tree)
        raise UserError(Problem("the file is not a recipe", saw, "a mapping of sections", str(path)))
    return tree


def dump_yaml(tree: dict[str, Any]) -> str:
    """The tree as YAML text that `read_yaml` reads back, whatever characters are in its texts."""
    return yaml.dump(tree, Dumper=_EscapingDumper, sort_keys=False, allow_unicode=True, width=120)


def parse_override_value(text: str) -> Any:
    """What was typed behind `key=`: YAML where it begins with a bracket or a quote, null, else the text itself.

    So a path may hold ` #` and `: `. What begins like YAML and is none, or not to its end, is text as well: `[SEP`.
    """
    if text in NULL_WORDS:
        return None
    if not text.startswith(("[", "{", '"', "'")):
        return text
    try:
        _check_bracket_depth(text)
        node = yaml.compose(text, _PlainTextLoader)
        if node is None or text[node.end_mark.index :].strip():  # a comment behind it
            return text
        value = yaml.load(text, _PlainTextLoader)  # a SafeLoader
        _check_tree_size(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return value


def apply_override(tree: dict[str, Any], override: str) -> Problem | None:
    """Set one `section.key=value` in the tree; items of a list are addressed by name: `phases.main.steps=100`.

    Returns what is wrong with the override; the tree then has all but that value.
    """
    key, equals, text = override.partition("=")
    where = "the command line"
    *parents, last = key.split(".")
    if not equals or "" in (*parents, last):
        return Problem("an override is not key=value", repr(override), "section.key=value", where)
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            by_name = {str(item.get("name")): item for item in node if isinstance(item, dict)}
            if part not in by_name:
                name = ".".join(parents[: depth + 1])
                return Problem(f"unknown key {name}", repr(part), suggest_choice(part, by_name), where)
            node = by_name[part]
        else:
            node = node.setdefault(part, {})
        if isinstance(node, str) and parents == ["tokenizer"]:  # a recipe may say `tokenizer: NAME` for short
            node = tree["tokenizer"] = {"name": node}
        if not isinstance(node, dict | list):
            return Problem(f"{key} goes below a plain value", format_value(node), "section.key=value", where)
    if isinstance(node, list):
        return Problem(f"{key} names a whole item", repr(text), f"{key}.KEY=value", where)
    node[last] = parse_override_value(text)
    return None


def _check_bracket_depth(text: str) -> None:
    """Errors: ValueError for more brackets in a row than values may be deep, over which PyYAML would take seconds."""
    if re.search(rf"(?:[\[{{]\s*){{{MAX_YAML_DEPTH + 1}}}", text):
        raise ValueError(TOO_DEEP)


def _check_tree_size(tree: Any) -> None:
    """Errors: ValueError for more values, or deeper ones, than any recipe has: aliases of aliases become billions."""
    count = 0
    level = [tree]
    for _ in range(MAX_YAML_DEPTH):
        next_level: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                next_level += node.values()
            elif isinstance(node, list):
                next_level += node
            if count + len(next_level) > MAX_YAML_VALUES:
                raise ValueError(f"it has more than {MAX_YAML_VALUES:,} values")
        if not next_level:
            return
        count += len(next_level)
        level = next_level
    raise ValueError(TOO_DEEP)


class _DepthLimitedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses values that lie too deep before it builds them."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _PlainTextLoader(_DepthLimitedLoader):
    """YAML whose plain values stay text, null apart: the type of each field reads them.

    YAML 1.1 would read `off` as false, 2024-01-01 as a date and 3e-4 as text. A key that stands twice is an error.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 -- typed by PyYAML
        first: [(tag, pattern) for tag, pattern in pairs if tag == "tag:yaml.org,2002:null"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        known: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in known:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", mark)
            known.add(key)
        return mapping


class _EscapingDumper(yaml.SafeDumper):
    """YAML in which a text with one of YAML's other line breaks is quoted and escaped."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in LINE_BREAKS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_EscapingDumper.add_representer(str, _represent_text)
