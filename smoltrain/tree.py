"""YAML text to a tree of plain values, and `section.key=value` overrides put into it."""

from pathlib import Path
from typing import Any

import yaml

from smoltrain.errors import Problem, UserError, nearest, seen


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Errors: UserError if it is not YAML, or no mapping."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _PlainText)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        saw = f"line {line}: {error.problem}"
        raise UserError(Problem("the file cannot be read as YAML", saw, "valid YAML", str(path))) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        saw = " ".join(str(error).split())
        raise UserError(Problem("the file cannot be read as YAML", saw, "valid YAML", str(path))) from None
    if not isinstance(tree, dict):
        saw = "nothing" if tree is None else seen(tree)
        raise UserError(Problem("the file is not a recipe", saw, "a mapping of sections", str(path)))
    return tree


def override(tree: dict[str, Any], words: str) -> Problem | None:
    """Set one `section.key=value` in the tree; items of a list are addressed by name: `phases.main.steps=100`."""
    key, equals, text = words.partition("=")
    where = "the command line"
    if not equals or not key:
        return Problem("an override is not key=value", repr(words), "section.key=value", where)
    try:
        value = yaml.load(text, _PlainText)  # a SafeLoader
    except yaml.YAMLError:  # `**/*.md` or `[SEP`: not YAML, but a text
        value = text
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            named = {str(p.get("name")): p for p in node if isinstance(p, dict)}
            if part not in named:
                name = ".".join(parents[: depth + 1])
                return Problem(f"unknown key {name}", repr(part), nearest(part, named), where)
            node = named[part]
        else:
            node = node.setdefault(part, {})
        if isinstance(node, str) and parents == ["tokenizer"]:
            node = tree["tokenizer"] = {"name": node}
        if not isinstance(node, dict | list):
            return Problem(f"{key} goes below a plain value", repr(node), "section.key=value", where)
    if isinstance(node, list):
        return Problem(f"{key} names a whole item", repr(text), f"{key}.KEY=value", where)
    node[last] = value
    return None


class _PlainText(yaml.SafeLoader):
    """YAML whose plain values stay text, null apart: the type of each field reads them.

    YAML 1.1 would read `off` as false, 2024-01-01 as a date and 3e-4 as text. A key that stands twice is an error.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 -- typed by PyYAML
        first: [(tag, pattern) for tag, pattern in pairs if tag == "tag:yaml.org,2002:null"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        keys = [self.construct_object(key) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", mark)
        return mapping
