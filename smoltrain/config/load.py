"""From a recipe and `section.key=value` overrides to a checked Config (schema.py), with all its problems at once.

Nothing here touches torch, the network or the data; `load_config` reads files and W&B's variables, and changes nothing.
"""

import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltrain.config.config_file import CONFIG_FILE, RUNS_FOLDER
from smoltrain.config.keys import expand_override, find_full_keys, suggest_key
from smoltrain.config.load_problems import blame_other_version, collect_problems, locate_key
from smoltrain.config.older_keys import update_sections
from smoltrain.config.override_text import format_overrides
from smoltrain.config.replaced_keys import drop_replaced_keys
from smoltrain.config.rules import find_contradictions
from smoltrain.config.schema import Config, ExportSection, GenerationSection
from smoltrain.config.wandb_env import read_wandb_environment
from smoltrain.config.yaml_text import apply_override, dump_yaml, read_yaml
from smoltrain.errors import Problem, UserError, problem_from_pydantic, suggest_choice
from smoltrain.files import name_missing_path
from smoltrain.redact import redact_tree

RECIPES_FOLDER = Path(__file__).parents[1] / "recipes"  # inside the package, so that a wheel has them too
DS_CONFIGS_FOLDER = Path(__file__).parents[1] / "ds_configs"
DEFAULT_RECIPE = "quickstart"  # of commands that name none
YAML_SUFFIXES = (".yaml", ".yml")  # of a recipe's file
RECIPE_WORDS = ("config", "config_file", "recipe", "yaml")  # by which other trainers take theirs


def list_recipes() -> dict[str, Path]:
    """The shipped recipes: name -> file."""
    return {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def split_recipe_words(words: list[str]) -> tuple[str, list[str]]:
    """The recipe and the overrides of a command line's words; the first word may be an override already.

    A word is an override if it has `key=` before any slash, or a dash in front; a path may hold an equals sign.
    """
    if not words or re.match(r"-.|[\w.-]+=", words[0]):
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
        if isinstance(values.get("run"), dict):
            values["run"].pop("stop_after", None)  # the phase that its newest start was in: said of that start alone
    _apply_wandb_environment(values)
    problems: list[Problem] = []
    given = overrides
    overrides = []
    for short in given:
        override = expand_override(short, values)
        overrides.append(override)
        problem = _find_misplaced_recipe(short) or _find_ambiguity(override, values) or apply_override(values, override)
        if problem:
            problems.append(problem)
    drop_replaced_keys(values, overrides)
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = run.get("name") or path.stem
        run["recipe"] = run.get("recipe") or ("" if provenance else path.stem)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        by_key = collect_problems(error, values, path, overrides)
        problems += blame_other_version(by_key.values(), provenance)
        raise UserError(*problems, *_problems_without_overrides(recipe, overrides, by_key, problems)) from None
    for problem in find_contradictions(config):
        problems.append(replace(problem, change=locate_key(problem.change, path, overrides)))
    if problems:
        raise UserError(*problems)
    return config


def read_run_config(path: Path) -> Config:
    """A resolved config.yaml back from a run folder (its `provenance` is not part of the config)."""
    values = read_yaml(path)
    provenance = values.pop("provenance", None)
    update_sections(values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(*blame_other_version(collect_problems(error, values, path).values(), provenance)) from None
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


def stop_after_phase(config: Config, phase: str | None) -> Config:
    """The same, to be trained up to the end of this phase; None is the last one."""
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
            problem_from_pydantic(
                ".".join(["export", *map(str, e["loc"][:1])]),
                e,
                f"--{str(e['loc'][0]).replace('_', '-')}" if e["loc"] else "--license or --license-name",
            )
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
    if path.suffix in YAML_SUFFIXES:
        if path.exists():
            return path
        is_shipped = path.stem in shipped and len(path.parts) == 1
        want = f"{path.stem!r}, the shipped one, or an existing YAML file" if is_shipped else "an existing YAML file"
        raise UserError(Problem("the recipe file is missing", name_missing_path(path), want, "the first argument"))
    if recipe in ("-", "/dev/stdin") or path.is_fifo() or path.is_char_device():
        want = "a .yaml file, which each rank and each later start can read again"
        raise UserError(Problem("a recipe is not read from a stream", repr(recipe), want, "the first argument"))
    want = f"{suggest_choice(recipe, shipped)}, or a path to a .yaml file"
    for there in (Path(f"{recipe}.yaml"), path / CONFIG_FILE, RUNS_FOLDER / path / CONFIG_FILE):
        if there.is_file():
            want = f"the path to its file, {there}"
            break
    raise UserError(Problem("no such recipe", repr(recipe), want, "the first argument"))


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


def _find_misplaced_recipe(word: str) -> Problem | None:
    """What is wrong with `--config mine.yaml`, as others take a recipe; nor is `recipe` short for run.recipe.

    Another recipe would be trained under the name of the one that was meant.
    """
    key, equals, text = word.partition("=")
    is_named = text.endswith(YAML_SUFFIXES) or text in list_recipes()
    if not equals or key not in RECIPE_WORDS or not (is_named or key == "recipe"):
        return None
    return Problem("the recipe is not given by a key", f"{key}={text}", f"{text} as the first word", "the command line")


def _find_ambiguity(override: str, values: dict[str, Any]) -> Problem | None:
    """What is wrong with an override whose key is short for several keys."""
    key, equals, text = override.partition("=")
    if not equals or len(find_full_keys(key, values)) < 2:
        return None
    want = suggest_key(key, values, text) or ""
    return Problem(f"{key} is short for several keys", repr(key), want, f"{key} on the command line")
