"""A config as YAML in which a comment above each key says what it means; read back, it is the same config."""

import textwrap
from collections.abc import Iterator

import yaml

from smoltrain.config.load import config_to_yaml
from smoltrain.config.reference import REQUIRED, find_key_references, read_sections
from smoltrain.config.schema import Config

WIDTH = 80  # columns of a comment


def config_to_commented_yaml(config: Config) -> str:
    """config_to_yaml with comments; of several phases or sources the first one has them."""
    text = config_to_yaml(config)
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    comments = dict(_find_comments(root, ""))
    lines: list[str] = []
    for number, line in enumerate(text.splitlines()):
        if number in comments:
            indent = " " * (len(line) - len(line.lstrip(" ")))
            lines += textwrap.wrap(
                comments[number], WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


def _find_comments(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[int, str]]:
    """Number of a line -> the comment above it, for the keys of a mapping and of what lies in them."""
    for key, value in node.value:
        name = prefix + key.value
        comment = _describe_place(name)
        if comment:
            yield key.start_mark.line, comment
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if items and isinstance(items[0], yaml.MappingNode):
            yield from _find_comments(items[0], f"{name}.")


def _describe_place(name: str) -> str | None:
    """What a section or a key means; None for what the schema does not know, as the keys of a class of transformers."""
    if name in read_sections() and "." not in name:
        return read_sections()[name].text
    keys = find_key_references(name) if "." in name else []
    if not keys:
        return None
    default = "" if keys[0].default == REQUIRED else f"; default {keys[0].default}"
    return f"{keys[0].meaning} ({keys[0].type}{default})"
