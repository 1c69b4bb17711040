"""W&B's environment variables as keys of `track`, read as transformers' WandbCallback and wandb itself read them.

A key on the command line wins over the environment, the environment over the recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smoltrain.config.schema import parse_whole_number

TEXT_VARIABLES = {
    "WANDB_PROJECT": "wandb_project",
    "WANDB_ENTITY": "wandb_entity",
    "WANDB_NAME": "wandb_name",
    "WANDB_RUN_ID": "wandb_id",
    "WANDB_NOTES": "wandb_notes",
    "WANDB_RUN_GROUP": "wandb_group",
    "WANDB_JOB_TYPE": "wandb_job_type",
}
MODE_VARIABLES = (
    "WANDB_MODE",
    "WANDB_DISABLED",
)  # read where track.wandb is auto, by wandb_connection.resolve_wandb_mode
LOG_MODEL_VALUES = {"checkpoint": "checkpoint", "end": "end", "false": "none"}
MIN_WATCH_STEPS = 100  # steps at least, as transformers has it


@dataclass(frozen=True)
class WandbSetting:
    """One key of `track`, the variable that sets it, and its value there."""

    variable: str
    key: str
    value: Any
    note: str | None = None  # what the variable asks for and cannot have


def read_wandb_environment(track: Mapping[str, Any], environment: Mapping[str, str]) -> list[WandbSetting]:
    """What the environment asks of a `track` section, whose own values say how often gradients are looked at."""
    given = {name: text for name, text in environment.items() if text.strip()}
    found = [WandbSetting(name, key, given[name]) for name, key in TEXT_VARIABLES.items() if name in given]
    modes = [name for name in MODE_VARIABLES if name in given]
    if modes:
        found.append(WandbSetting(modes[0], "wandb", "auto"))
    if "WANDB_TAGS" in given:
        tags = [tag.strip() for tag in given["WANDB_TAGS"].split(",")]
        found.append(WandbSetting("WANDB_TAGS", "wandb_tags", tuple(tag for tag in tags if tag)))
    if "WANDB_LOG_MODEL" in given:
        word = given["WANDB_LOG_MODEL"].lower()
        note = None
        if word not in LOG_MODEL_VALUES:
            note = f"WANDB_LOG_MODEL={word} is none of {', '.join(LOG_MODEL_VALUES)}"
        found.append(WandbSetting("WANDB_LOG_MODEL", "wandb_model", LOG_MODEL_VALUES.get(word, "none"), note))
    if "WANDB_WATCH" in given:
        found.append(_read_watch_setting(given["WANDB_WATCH"].lower(), track))
    return found


def _read_watch_setting(word: str, track: Mapping[str, Any]) -> WandbSetting:
    """Gradients as often as the recipe looks at them, or as transformers does; parameters are not logged."""
    every = _parse_int(track.get("gradients_every"), 0) or max(MIN_WATCH_STEPS, _parse_int(track.get("print_every"), 0))
    wants = word in ("gradients", "all")
    note = None
    if word not in ("gradients", "false"):
        note = f"WANDB_WATCH={word}: of what it may watch, gradients are logged"
    return WandbSetting("WANDB_WATCH", "gradients_every", every if wants else 0, note)


def _parse_int(value: object, otherwise: int) -> int:
    """A whole number of a recipe, where numbers are text until they are checked."""
    number = parse_whole_number(str(value))
    return otherwise if number is None else number
