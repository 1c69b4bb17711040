"""From a recipe and `section.key=value` overrides to a checked Config (schema.py), with all its problems at once.

Nothing here touches torch, the network or the data; `load_config` reads files and W&B's variables, and changes nothing.
"""

import difflib
import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltrain.config.keys import (
    NEAR,
    NEAR_SIBLING,
    expand_override,
    find_full_keys,
    is_word_of_recipes,
    list_keys,
    list_sections,
    suggest_key,
)
from smoltrain.config.older_keys import update_sections
from smoltrain.config.override_text import format_overrides
from smoltrain.config.rules import MUON_KEYS, find_contradictions
from smoltrain.config.schema import HORIZON_KEYS, Config, ExportSection, GenerationSection, SourceSection
from smoltrain.config.wandb_env import read_wandb_environment
from smoltrain.config.yaml_text import apply_override, dump_yaml, parse_override_value, read_yaml
from smoltrain.errors import Problem, UserError, problem_from_pydantic, suggest_choice
from smoltrain.redact import redact_tree

RECIPES_FOLDER = Path(__file__).parents[1] / "recipes"  # inside the package, so that a wheel has them too
DS_CONFIGS_FOLDER = Path(__file__).parents[1] / "ds_configs"
DEFAULT_RECIPE = "quickstart"  # of commands that name none
SOURCE_KEYS = ("package", "path", "hub")
MAX_ANSWERED_KEYS = 50  # unknown keys for which the one that is meant is looked for, some milliseconds each
BATCH_KEYS = ("accumulation", "rows_per_step")  # of which a batch has one


def list_recipes() -> dict[str, Path]:
    """The shipped recipes: name -> file."""
    return {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def split_recipe_words(words: list[str]) -> tuple[str, list[str]]:
    """The recipe and the overrides of a command line's words; the first word may be an override already.

    A word is an override if it has `key=` before any slash, or a dash in front; a path may hold an equals sign.
    """
    if not words or re.match(r"-|[\w.-]+=", words[0]):
        return DEFAULT_RECIPE, words
    return words[0], words[1:]


def read_recipe_headline(recipe: Path) -> str:
    """What a recipe says of itself: its first line, `# NAME: SENTENCE`, without the name."""
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().removeprefix(f"{recipe.stem}:").strip()


def load_config(recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), **sections: Any) -> Config:
    """The config of a recipe (a shipped name, or a path to YAML) under overrides.

    Overrides are `section.key=value` texts, as on the command line, or values by dotted key; keywords are sections with
    the values to change: `load_config("quickstart", {"phases.main.steps": 100}, run={"name": "first"})`. An override
    may shorten its key as far as no other key of the recipe is meant (keys.py); a file spells keys in full.
    Errors: UserError with every field that is wrong, or else every rule that is broken (rules.py), each naming the key
    to change. Where overrides are wrong, the rules are tried without them.
    """
    recipe = str(recipe)
    overrides = format_overrides(overrides, sections)
    path = _find_recipe(recipe)
    values = read_yaml(path)
    provenance = values.pop("provenance", None)  # a run's own config.yaml is a recipe too
    if provenance:
        update_sections(values)
    _apply_wandb_environment(values)
    problems: list[Problem] = []
    given = overrides
    overrides = []
    for short in given:
        override = expand_override(short, values)
        overrides.append(override)
        problem = _find_ambiguity(override, values) or apply_override(values, override)
        if problem:
            problems.append(problem)
    _drop_recipe_source(values, overrides)
    _drop_recipe_alternatives(values, overrides)
    _drop_keys_of_other_optimizer(values, overrides)
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = run.get("name") or path.stem
        run["recipe"] = run.get("recipe") or ("" if provenance else path.stem)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        by_key = _collect_problems(error, values, path, overrides)
        problems += by_key.values()
        raise UserError(*problems, *_problems_without_overrides(recipe, overrides, by_key, problems)) from None
    for problem in find_contradictions(config):
        problems.append(replace(problem, change=_locate_key(problem.change, path, overrides)))
    if problems:
        raise UserError(*problems)
    return config


def read_run_config(path: Path) -> Config:
    """A resolved config.yaml back from a run folder (its `provenance` is not part of the config)."""
    values = read_yaml(path)
    values.pop("provenance", None)
    update_sections(values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(*_collect_problems(error, values, path).values()) from None
    if not config.phases:
        raise UserError(Problem("there is no phase", "[]", "at least one", f"phases in {path.name}"))
    for phase in config.phases:
        if phase.steps is None:
            what, change = f"phases.{phase.name}.steps is missing", f"phases.{phase.name}.steps in {path.name}"
            raise UserError(Problem(what, "nothing", "a value", change))
    return config


def config_to_yaml(config: Config) -> str:
    """The whole config as YAML text, which `load_config` reads back as an equal one, but for secrets in its URLs."""
    return dump_yaml(redacted_config(config))


def redacted_config(config: Config) -> dict[str, Any]:
    """The config as plain values, as it is written down and compared: no URL has its secret."""
    values = config.model_dump(mode="json")
    return values | {"data": redact_tree(values["data"])}


def stop_after_phase(config: Config, phase: str) -> Config:
    """The same, to be trained up to the end of this phase."""
    return config.model_copy(update={"run": config.run.model_copy(update={"stop_after": phase})})


def cut_micro_batch(config: Config, rows_per_step: int, world_size: int) -> Config:
    """The same; where batch.rows_per_step leaves a rank fewer rows of a step than batch.micro_batch, it takes these."""
    batch = config.batch
    rows, rest = divmod(rows_per_step, world_size)
    if batch.rows_per_step is None or batch.micro_batch == "auto" or rest or not 0 < rows < batch.micro_batch:
        return config
    return config.model_copy(update={"batch": batch.model_copy(update={"micro_batch": rows})})


def override_generation(settings: GenerationSection, **options: float | str | None) -> GenerationSection:
    """`settings` with those command-line options that were given, checked again."""
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return GenerationSection.model_validate(settings.model_dump() | given)
    except ValidationError as error:
        problems: list[Problem] = []
        for e in error.errors():
            key = str(e["loc"][0])
            problems.append(problem_from_pydantic(f"generation.{key}", e, f"--{key.replace('_', '-')}"))
        raise UserError(*problems) from None


def override_export(section: ExportSection, options: Mapping[str, Any]) -> ExportSection:
    """The section with those command-line options that were given, checked again."""
    given = {key: value for key, value in options.items() if value}
    if given.get("license") not in (None, "other"):
        given.setdefault("license_name", None)
    try:
        return ExportSection.model_validate(section.model_dump() | given)
    except ValidationError as error:
        problems = [
            problem_from_pydantic(".".join(["export", *map(str, e["loc"][:1])]), e, "--license, --language")
            for e in error.errors()
        ]
        raise UserError(*problems) from None


def _apply_wandb_environment(values: dict[str, Any]) -> None:
    """W&B's variables take the place of the recipe's keys; overrides come later, and win."""
    track = values.setdefault("track", {})
    if isinstance(track, dict):
        for setting in read_wandb_environment(track, os.environ):
            track[setting.key] = setting.value


def _find_recipe(recipe: str) -> Path:
    shipped = list_recipes()
    if recipe in shipped:
        return shipped[recipe]
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if path.exists():
            return path
        raise UserError(Problem("the recipe file is missing", str(path), "an existing YAML file", "the first argument"))
    want = f"{suggest_choice(recipe, shipped)}, or a path to a .yaml file"
    raise UserError(Problem("no such recipe", repr(recipe), want, "the first argument"))


def _drop_recipe_source(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> None:
    """A data source on the command line takes the place of the recipe's, with the keys that belonged to that one."""
    given = _keys_with_value(overrides)
    data = values.get("data")
    if isinstance(data, dict) and given & {f"data.{key}" for key in SOURCE_KEYS}:
        for key in {*SourceSection.model_fields, "sources"} - {"text_field"}:
            if not any(f"{name}.".startswith(f"data.{key}.") for name in given):
                data.pop(key, None)


def _drop_recipe_alternatives(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> None:
    """The length of a phase on the command line takes the place of the recipe's, whichever key says it; rows too."""
    given = _keys_with_value(overrides)
    phases = values.get("phases")
    sections: list[tuple[str, Any, tuple[str, ...]]] = [("batch", values.get("batch"), BATCH_KEYS)]
    for phase in phases if isinstance(phases, list) else []:
        if isinstance(phase, dict):
            sections.append((f"phases.{phase.get('name')}", phase, HORIZON_KEYS))
    for name, section, keys in sections:
        said = {key for key in keys if f"{name}.{key}" in given}
        if said and isinstance(section, dict):
            for key in {*keys} - said:
                section.pop(key, None)


def _drop_keys_of_other_optimizer(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> None:
    """An optimizer on the command line takes the place of the recipe's, with the keys that mean nothing beside it."""
    given = _keys_with_value(overrides)
    section = values.get("optimizer")
    if isinstance(section, dict) and "optimizer.kind" in given and section.get("kind") == "adamw":
        for key in MUON_KEYS:
            if f"optimizer.{key}" not in given:
                section.pop(key, None)


def _keys_with_value(overrides: list[str] | tuple[str, ...]) -> set[str]:
    """The keys that overrides give a value, null apart."""
    texts: dict[str, str] = {}
    for override in overrides:
        key, _, texts[key] = override.partition("=")  # the last one counts
    return {key for key, text in texts.items() if parse_override_value(text) is not None}


def _locate_key(key: str, path: Path, overrides: list[str] | tuple[str, ...]) -> str:
    """The place that gave a key its value: the command line if an override named it, else the file."""
    overridden = [override.partition("=")[0] + "." for override in overrides]
    keys = [alternative + "." for alternative in key.split(" or ")]
    is_overridden = any(k.startswith(o) or o.startswith(k) for k in keys for o in overridden)
    return f"{key} on the command line" if is_overridden else f"{key} in {path.name}"


def _collect_problems(
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
        change = _locate_key(key, path, overrides)
        if e["type"] == "extra_forbidden":
            if len(problems) < MAX_ANSWERED_KEYS:
                problems |= _describe_unknown_key(key, e["input"], values, path, overrides)
            else:
                problems[key] = Problem(f"unknown key {key}", repr(names[-1]), "a key of a recipe", change)
            continue
        problem = problem_from_pydantic(key, e, change)
        if key in problems:
            problem = replace(problem, want=f"{problems[key].want} or {problem.want}")
        problems[key] = problem
    return problems


def _problems_without_overrides(
    recipe: str, overrides: list[str] | tuple[str, ...], wrong_keys: Container[str], known: list[Problem]
) -> list[Problem]:
    """What the recipe would still be refused for without the overrides that gave the wrong values."""
    remaining = [override for override in overrides if override.partition("=")[0] not in wrong_keys]
    if len(remaining) == len(overrides):
        return []
    try:
        load_config(recipe, remaining)
    except UserError as error:
        known_whats = {problem.what for problem in known}
        return [problem for problem in error.problems if problem.what not in known_whats]
    return []


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


def _find_ambiguity(override: str, values: dict[str, Any]) -> Problem | None:
    """What is wrong with an override whose key is short for several keys."""
    key, equals, text = override.partition("=")
    if not equals or len(find_full_keys(key, values)) < 2:
        return None
    want = suggest_key(key, values, text) or ""
    return Problem(f"{key} is short for several keys", repr(key), want, f"{key} on the command line")


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
    return {key: Problem(f"unknown key {key}", repr(name), want, _locate_key(key, path, overrides))}


def _count_values(value: object) -> int:
    """How many plain values and lists stand in a mapping, those of its mappings included."""
    return sum(map(_count_values, value.values())) if isinstance(value, dict) else 1
