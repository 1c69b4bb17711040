"""What does not fit a recipe, as problems: wrong values and unknown keys, each with the place that it came from."""

import difflib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltrain.config.keys import NEAR, NEAR_SIBLING, is_word_of_recipes, list_keys, list_sections, suggest_key
from smoltrain.errors import Problem, problem_from_pydantic

MAX_ANSWERED_KEYS = 50  # unknown keys for which the one that is meant is looked for, some milliseconds each
# A section -> the key that a plain value in its place is most likely meant for, as in data=input.txt.
PLAIN_VALUE_KEYS = {"data": "data.path", "run": "run.name", "init": "init.from"}


def locate_key(key: str, path: Path, overrides: list[str] | tuple[str, ...]) -> str:
    """The place that gave a key its value: the command line if an override named it, else the file."""
    overridden = [override.partition("=")[0] + "." for override in overrides]
    keys = [alternative + "." for alternative in key.split(" or ")]
    is_overridden = any(k.startswith(o) or o.startswith(k) for k in keys for o in overridden)
    return f"{key} on the command line" if is_overridden else f"{key} in {path.name}"


def collect_problems(
    error: ValidationError, values: dict[str, Any], path: Path, overrides: list[str] | tuple[str, ...] = ()
) -> dict[str, Problem]:
    """pydantic's errors in smoltrain's own form, by key; a value that fails every type of a union is one problem."""
    problems: dict[str, Problem] = {}
    for e in error.errors():
        # Without the types of a union that pydantic has tried, which are no keys.
        parts = [p for p in e["loc"] if p not in ("int", "constrained-int") and not str(p).startswith("literal[")]
        if parts[0] == "model" and len(parts) > 1:  # pydantic names the kind of model that it read
            del parts[1]
        names = _name_key_parts(parts, values)
        key = ".".join(names)
        change = locate_key(key, path, overrides)
        if e["type"] == "extra_forbidden":
            if len(problems) < MAX_ANSWERED_KEYS:
                problems |= _describe_unknown_key(key, e["input"], values, path, overrides)
            else:
                problems[key] = Problem(f"unknown key {key}", repr(names[-1]), "a key of a recipe", change)
            continue
        problem = problem_from_pydantic(key, e, change)
        if key in PLAIN_VALUE_KEYS and isinstance(e["input"], str):
            meant = f"{PLAIN_VALUE_KEYS[key]}={e['input']}"
            problem = replace(problem, want=f"{meant}, or another of its keys, which `smoltrain explain {key}` lists")
        if key in problems:
            problem = replace(problem, want=f"{problems[key].want} or {problem.want}")
        problems[key] = problem
    return problems


def blame_other_version(problems: Iterable[Problem], provenance: object) -> list[Problem]:
    """The same; unknown keys of a file that a run wrote itself may be those of another version, which is named."""
    starts = provenance.get("starts") if isinstance(provenance, dict) else None
    newest = starts[-1] if isinstance(starts, list) and starts else None
    commit = newest.get("git_commit") if isinstance(newest, dict) else None
    writer = (
        f"the smoltrain that wrote the file, git commit {commit}" if commit else "the smoltrain that wrote the file"
    )
    named: list[Problem] = []
    for problem in problems:
        is_of_file = not problem.change.endswith("on the command line")
        is_written = bool(provenance) and is_of_file and problem.what.startswith("unknown key")
        named.append(replace(problem, want=f"{problem.want}; or {writer}") if is_written else problem)
    return named


def _name_key_parts(parts: list[Any], values: Any) -> list[str]:
    """The parts of a key as the command line names them: phases and data.sources by name, not by number."""
    names: list[str] = []
    node: Any = values
    for part in parts:
        try:
            node = node[part]
        except (LookupError, TypeError):  # the key is missing
            node = None
        name = node.get("name", part) if isinstance(part, int) and isinstance(node, dict) else part
        names.append(str(name))
    return names


def _describe_unknown_key(
    key: str, value: object, values: dict[str, Any], path: Path, overrides: list[str] | tuple[str, ...]
) -> dict[str, Problem]:
    """The problem of an unknown key, by key; of an unknown section that is near to none, one for each key in it."""
    section, _, name = key.rpartition(".")
    sections = list_sections(values)
    siblings = sections.get(section, sections[""])
    is_unknown_section = not section or section not in sections
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=NEAR if is_unknown_section else NEAR_SIBLING)
    if isinstance(value, dict) and is_unknown_section and 0 < _count_values(value) <= MAX_ANSWERED_KEYS:
        inside = {full.split(".")[1] for full in list_keys(values) if full.partition(".")[0] in near}
        if not value.keys() <= inside:
            found: dict[str, Problem] = {}
            for inner, inner_value in value.items():
                found |= _describe_unknown_key(f"{key}.{inner}", inner_value, values, path, overrides)
            return found
    want = f"{near[0]!r} (the nearest valid one)" if near else f"one of {', '.join(sorted(siblings))}"
    is_misspelt_section = not section and near and not is_word_of_recipes(name, values)
    if not (isinstance(value, dict) or is_misspelt_section):
        is_override = any(override.partition("=")[0] == key for override in overrides)
        want = suggest_key(key, values, value if is_override else None) or want
    return {key: Problem(f"unknown key {key}", repr(name), want, locate_key(key, path, overrides))}


def _count_values(value: object) -> int:
    """How many plain values and lists stand in a mapping, those of its mappings included."""
    return sum(map(_count_values, value.values())) if isinstance(value, dict) else 1
