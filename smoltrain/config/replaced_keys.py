"""Keys of a recipe whose place an override takes: of several ways to say one thing, the command line's counts alone."""

from collections.abc import Sequence
from typing import Any

from smoltrain.config.rules import MUON_KEYS
from smoltrain.config.schema import HORIZON_KEYS, SourceSection
from smoltrain.config.yaml_text import parse_override_value

SOURCE_KEYS = ("package", "path", "hub")
BATCH_KEYS = ("accumulation", "rows_per_step")  # of which a batch has one


def drop_replaced_keys(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Take from a recipe's values what the overrides say in another way."""
    given = _keys_with_value(overrides)
    _drop_recipe_source(values, given)
    _drop_recipe_alternatives(values, given)
    _drop_keys_of_other_optimizer(values, given)


def _drop_recipe_source(values: dict[str, Any], given: set[str]) -> None:
    """A data source on the command line takes the place of the recipe's, with the keys that belonged to that one."""
    data = values.get("data")
    if isinstance(data, dict) and given & {f"data.{key}" for key in SOURCE_KEYS}:
        for key in {*SourceSection.model_fields, "sources"} - {"text_field"}:
            if not any(f"{name}.".startswith(f"data.{key}.") for name in given):
                data.pop(key, None)


def _drop_recipe_alternatives(values: dict[str, Any], given: set[str]) -> None:
    """The length of a phase on the command line takes the place of the recipe's, whichever key says it; rows too."""
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


def _drop_keys_of_other_optimizer(values: dict[str, Any], given: set[str]) -> None:
    """An optimizer on the command line takes the place of the recipe's, with the keys that mean nothing beside it."""
    section = values.get("optimizer")
    if isinstance(section, dict) and "optimizer.kind" in given and section.get("kind") != "muon":
        for key in MUON_KEYS:
            if f"optimizer.{key}" not in given:
                section.pop(key, None)


def _keys_with_value(overrides: Sequence[str]) -> set[str]:
    """The keys that overrides give a value, null apart."""
    texts: dict[str, str] = {}
    for override in overrides:
        key, _, texts[key] = override.partition("=")  # the last one counts
    return {key for key, text in texts.items() if parse_override_value(text) is not None}
