"""From a recipe and `section.key=value` overrides to a checked Config (schema.py), with every problem said at once.

Nothing here touches torch, the network or the data; `load` is pure but for reading files and W&B's variables.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltrain import redact, tree, wandb_env
from smoltrain.contradictions import contradictions
from smoltrain.errors import Problem, UserError, invalid, nearest
from smoltrain.schema import (
    Config,
    GenerationSection,
    MixedSource,
    ModelSection,
    PhaseSection,
    Section,
    SourceSection,
    TransformersSection,
)

RECIPES = Path(__file__).parent / "recipes"
SOURCES = ("package", "path", "hub")
ON_STDIN = "--config-on-stdin"  # before the words of launch/train.py, which then are for the list of processes alone
DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"


def recipes() -> dict[str, Path]:
    """The shipped recipes: name -> file."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def headline(recipe: Path) -> str:
    """What a recipe says of itself: its first line, `# NAME: SENTENCE`, without the name."""
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().removeprefix(f"{recipe.stem}:").strip()


def load(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config of a recipe (a shipped name, or a path to YAML) under `section.key=value` overrides.

    Errors: UserError with ALL problems found, each naming the key to change.
    """
    path = _recipe_path(recipe)
    values = tree.read(path)
    own = values.pop("provenance", None)  # a run's own config.yaml is a recipe too
    _set_by_environment(values)
    problems = [p for text in overrides if (p := tree.override(values, text))]
    _replace_source(values, overrides)
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = run.get("name") or path.stem
        run["recipe"] = run.get("recipe") or ("" if own else path.stem)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        wrong = _problems(error, values, path, overrides)
        problems += wrong.values()
        raise UserError(*problems, *_beside(recipe, overrides, wrong, problems)) from None
    problems += [replace(p, change=_where(p.change, path, overrides)) for p in contradictions(config)]
    if problems:
        raise UserError(*problems)
    return config


def read(path: Path) -> Config:
    """A resolved config.yaml back from a run folder (its `provenance` is not part of the config)."""
    values = tree.read(path)
    values.pop("provenance", None)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(*_problems(error, values, path).values()) from None
    if not config.phases:
        raise UserError(Problem("there is no phase", "[]", "at least one", f"phases in {path.name}"))
    return config


def to_yaml(config: Config) -> str:
    """The whole config as YAML, which `load` and `read` turn back into an equal one, but for secrets in its URLs."""
    return tree.write(recorded(config))


def recorded(config: Config) -> dict[str, Any]:
    """The config as it is written down, and as two of them are compared: no URL has its secret."""
    values = config.model_dump(mode="json")
    return values | {"data": redact.tree(values["data"])}


def up_to(config: Config, phase: str) -> Config:
    """The same, to be trained up to the end of this phase."""
    return config.model_copy(update={"run": config.run.model_copy(update={"stop_after": phase})})


def first_steps(config: Config, steps: int) -> list[str]:
    """Overrides by which its recipe trains so many steps of its first phase and does nothing beside, to measure."""
    phase = config.phases[0]
    return [
        f"run.stop_after={phase.name}", f"phases.{phase.name}.steps={steps}", f"phases.{phase.name}.warmup_steps=0",
        f"phases.{phase.name}.decay_steps={steps if phase.decay_steps else 0}", "evaluate.every=0", "sample.every=0",
        "checkpoint.every=0", "track.gradients_every=0", "track.wandb=off",
    ]  # fmt: skip


def revise(settings: GenerationSection, **options: float | None) -> GenerationSection:
    """`settings` with those command-line options that were given, checked again."""
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return GenerationSection.model_validate(settings.model_dump() | given)
    except ValidationError as error:
        named = [(e, f"generation.{e['loc'][0]}", f"--{e['loc'][0]}".replace("_", "-")) for e in error.errors()]
        raise UserError(*[invalid(key, e, option) for e, key, option in named]) from None


def _set_by_environment(values: dict[str, Any]) -> None:
    """W&B's variables take the place of the recipe's keys; overrides come later, and win."""
    if isinstance(track := values.setdefault("track", {}), dict):
        for one in wandb_env.asked(track, os.environ):
            track[one.key] = one.value


def _recipe_path(recipe: str) -> Path:
    shipped = recipes()
    if recipe in shipped:
        return shipped[recipe]
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if path.exists():
            return path
        raise UserError(Problem("the recipe file is missing", str(path), "an existing YAML file", "the first argument"))
    want = f"{nearest(recipe, shipped)}, or a path to a .yaml file"
    raise UserError(Problem("no such recipe", repr(recipe), want, "the first argument"))


def _replace_source(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> None:
    """A data source on the command line takes the place of the recipe's, with the keys that belonged to that one."""
    typed = [text.partition("=") for text in overrides]
    given = {key for key, _, text in typed if tree.value(text) is not None}
    data = values.get("data")
    if given & {f"data.{key}" for key in SOURCES} and isinstance(data, dict):
        for key in {*SourceSection.model_fields, "sources"} - {"text_field"}:
            if not any(f"{name}.".startswith(f"data.{key}.") for name in given):
                data.pop(key, None)


def _where(key: str, path: Path, overrides: list[str] | tuple[str, ...]) -> str:
    """The place that gave a key its value: the command line if an override named it, else the file."""
    typed = [override.partition("=")[0] + "." for override in overrides]
    keys = [k + "." for k in key.split(" or ")]
    named = any(k.startswith(t) or t.startswith(k) for k in keys for t in typed)
    return f"{key} on the command line" if named else f"{key} in {path.name}"


def _problems(
    error: ValidationError, values: dict[str, Any], path: Path, overrides: list[str] | tuple[str, ...] = ()
) -> dict[str, Problem]:
    """pydantic's errors in smoltrain's own form, by key; a value that fails every type of a union is one problem."""
    merged: dict[str, Problem] = {}
    for e in error.errors():
        parts = [p for p in e["loc"] if p not in ("int", "constrained-int") and not str(p).startswith("literal[")]
        if parts[0] == "model" and len(parts) > 1:  # pydantic names the kind of model that it read
            del parts[1]
        named = [_name(values, parts[:i], p) for i, p in enumerate(parts)]
        key = ".".join(named)
        where = _where(key, path, overrides)
        if e["type"] == "extra_forbidden":
            want = nearest(named[-1], _keys_beside(parts, values))
            problem = Problem(f"unknown key {key}", repr(named[-1]), want, where)
        else:
            problem = invalid(key, e, where)
        before = merged.get(key)
        merged[key] = replace(problem, want=f"{before.want} or {problem.want}") if before else problem
    return merged


def _beside(
    recipe: str, overrides: list[str] | tuple[str, ...], wrong: dict[str, Problem], told: list[Problem]
) -> list[Problem]:
    """What the recipe would still be refused for without the overrides that gave the `wrong` values."""
    rest = [text for text in overrides if text.partition("=")[0] not in wrong]
    if len(rest) == len(overrides):
        return []
    try:
        load(recipe, rest)
    except UserError as error:
        named = {problem.what for problem in told}
        return [problem for problem in error.problems if problem.what not in named]
    return []


def _name(values: Any, above: list[Any], part: Any) -> str:
    """A part of a key as the command line says it: phases and data.sources by name."""
    if isinstance(part, int):
        try:
            for key in above:
                values = values[key]
            return str(values[part]["name"])
        except (KeyError, IndexError, TypeError):
            pass
    return str(part)


def _keys_beside(parts: list[Any], values: dict[str, Any]) -> list[str]:
    """The valid keys at the place of an unknown one."""
    if len(parts) == 1:
        section: Any = Config
    elif parts[0] == "phases":
        section = PhaseSection
    elif parts[:2] == ["data", "sources"]:
        section = MixedSource
    elif parts[0] == "model":
        section = TransformersSection if values["model"].get("kind") == "transformers" else ModelSection
    else:
        section = Config.model_fields[parts[0]].annotation
    known = isinstance(section, type) and issubclass(section, Section)
    return [field.alias or name for name, field in section.model_fields.items()] if known else []
