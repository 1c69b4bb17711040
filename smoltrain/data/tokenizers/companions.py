"""What stands beside the tokenizer.json and the weights of a Hugging Face folder, and goes out as it came in.

tokenizer_config.json     which special token has which role, the chat template, the side to pad on
special_tokens_map.json   the same roles, in folders of transformers 4; it is read, and not written
chat_template.jinja       the chat template as a file of its own; additional_chat_templates/NAME.jinja are further ones
generation_config.json    how its authors want it to write, and the ids that end a text
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.errors import Problem, UserError

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
CHAT_TEMPLATE_FILE, CHAT_TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA_SPECIAL_KEYS = (
    "additional_special_tokens",
    "extra_special_tokens",
)  # the words of transformers 4 and 5 for those without role
# Not handed on: places on the machine of before, code that does not come along, and what adds tokens to a text.
DROPPED_KEYS = (
    *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "is_local", "backend"),
    *("auto_map", "processor_class", "add_bos_token", "add_eos_token"),
)

# Keys of generation_config.json that our own sampling follows, or that mean nothing to it.
SUPPORTED_GENERATION_KEYS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "max_new_tokens",
    "max_length",
    "suppress_tokens",
    "use_cache",
)


@dataclass(frozen=True)
class Companions:
    """What came beside a tokenizer.json."""

    about: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    templates: Mapping[str, str] = field(default_factory=dict)  # file -> text

    def token_for_role(self, role: str) -> str | None:
        """The token of a role; files hold it as text or as an object."""
        return _token_text(self.about.get(role))

    @property
    def special(self) -> set[str]:
        """Every token that has a role, or is named as special without one."""
        words = [self.about.get(role) for role in TOKEN_ROLES]
        for key in EXTRA_SPECIAL_KEYS:
            named = self.about.get(key)
            words += named.values() if isinstance(named, dict) else named if isinstance(named, list) else ()
        return {word for x in words if (word := _token_text(x)) is not None}


def is_companion_file(name: str) -> bool:
    """Whether a file of a repository is of those that stand beside a tokenizer."""
    return (
        name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE_FILE)
        or re.fullmatch(rf"{CHAT_TEMPLATE_FOLDER}/[^/]+\.jinja", name) is not None
    )


def read_companions(folder: Path) -> Companions:
    """Those in a folder, as far as there are any. Errors: UserError for a file that is no JSON object, or no text."""
    about = (read_json_object(folder / SPECIAL_TOKENS_MAP) if (folder / SPECIAL_TOKENS_MAP).is_file() else {}) | (
        read_json_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    )
    about = {key: value for key, value in about.items() if key not in DROPPED_KEYS}
    if isinstance(about.get(EXTRA_SPECIAL_KEYS[1]), list):  # transformers 4 takes no list under the newer word
        about.setdefault(EXTRA_SPECIAL_KEYS[0], about.pop(EXTRA_SPECIAL_KEYS[1]))
    templates = {name: _read_template(folder / name) for name in _list_templates(folder)}
    if templates:  # transformers before 4.48 reads no such files
        named = [
            {"name": Path(name).stem, "template": text}
            for name, text in templates.items()
            if name != CHAT_TEMPLATE_FILE
        ]
        default = templates.get(CHAT_TEMPLATE_FILE)
        named = [{"name": "default", "template": default}, *named] if default is not None and named else named
        about["chat_template"] = named or default
    return Companions(about, templates)


def write_companions(companions: Companions, folder: Path, ours: dict[str, Any]) -> None:
    """The files beside a tokenizer.json, with `ours` over what came in."""
    text = json.dumps({**companions.about, **ours}, indent=2, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
    for name, template in companions.templates.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(template, encoding="utf-8", newline="")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, and where it names no end of a text that of config.json, as transformers has it."""
    file, model = folder / GENERATION_CONFIG, folder / "config.json"
    about = read_json_object(file) if file.is_file() else {}
    about = {key: value for key, value in about.items() if key not in ("_from_model_config", "transformers_version")}
    if about.get("eos_token_id") is None and model.is_file():
        values = read_json_object(model)
        text = values.get("text_config")  # of a model that also sees or hears
        parts = [values, text if isinstance(text, dict) else {}]
        about["eos_token_id"] = next((end for part in parts if (end := part.get("eos_token_id")) is not None), None)
    return {key: value for key, value in about.items() if value is not None}


def eos_token_ids(about: Mapping[str, Any]) -> list[int]:
    """The ids that end a text by a generation_config.json: there it is one, or a list."""
    said = about.get("eos_token_id")
    ids = [i for i in (said if isinstance(said, list) else [said]) if type(i) is int and i >= 0]
    return list(dict.fromkeys(ids))


def suppressed_token_ids(about: Mapping[str, Any]) -> list[int]:
    """The ids that are never drawn by a generation_config.json."""
    said = about.get("suppress_tokens")
    return [i for i in said if type(i) is int and i >= 0] if isinstance(said, list) else []


def unsupported_generation_settings(about: Mapping[str, Any]) -> list[str]:
    """What a generation_config.json asks for and our own sampling does not do; a value of 0 or 1 asks for nothing."""
    kept = {
        key: value
        for key, value in about.items()
        if key not in SUPPORTED_GENERATION_KEYS and not key.endswith("_token_id")
    }
    return [f"{key}={value}" for key, value in kept.items() if value not in (None, 0, 1, [])]


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: UserError if there is none."""
    try:
        value = json.loads(files.read_text_file(file))
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(Problem(f"{file.name} cannot be read", str(error), "a JSON object", str(file))) from None
    except RecursionError:
        saw = "values nested too deeply"
        raise UserError(Problem(f"{file.name} cannot be read", saw, "a JSON object", str(file))) from None
    return value


def _list_templates(folder: Path) -> Iterator[str]:
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        yield CHAT_TEMPLATE_FILE
    yield from sorted(
        f"{CHAT_TEMPLATE_FOLDER}/{path.name}"
        for path in (folder / CHAT_TEMPLATE_FOLDER).glob("*.jinja")
        if path.is_file()
    )


def _read_template(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            return opened.read()
    except (OSError, ValueError) as error:
        raise UserError(Problem(f"{file.name} cannot be read", str(error), "text in UTF-8", str(file))) from None


def _token_text(token: object) -> str | None:
    word = token.get("content") if isinstance(token, dict) else token
    return word if isinstance(word, str) else None
