"""What stands beside the tokenizer.json and the weights of a Hugging Face folder. It is passed on with a tokenizer that
is saved, without the keys that name places or code.

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

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The words of transformers 4 and 5 for special tokens without a role.
EXTRA_SPECIAL_KEYS = ("additional_special_tokens", "extra_special_tokens")
# Not handed on: places on the machine of before, code that does not come along, and what adds tokens to a text.
DROPPED_KEYS = (
    *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "is_local", "backend"),
    *("auto_map", "processor_class", "add_bos_token", "add_eos_token"),
)
# Keys of generation_config.json that our own sampling follows, or that mean nothing to it.
SUPPORTED_GENERATION_KEYS = (
    *("do_sample", "temperature", "top_k", "top_p"),
    *("max_new_tokens", "max_length", "suppress_tokens", "use_cache"),
)


@dataclass(frozen=True)
class Companions:
    """What came beside a tokenizer.json."""

    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)  # file -> text

    def token_for_role(self, role: str) -> str | None:
        """The token of a role; files hold it as text or as an object."""
        return _token_text(self.tokenizer_config.get(role))

    @property
    def special_tokens(self) -> set[str]:
        """Every token that has a role, or is named as special without one."""
        tokens = [self.tokenizer_config.get(role) for role in TOKEN_ROLES]
        for key in EXTRA_SPECIAL_KEYS:
            extra = self.tokenizer_config.get(key)
            if isinstance(extra, dict):
                tokens += extra.values()
            elif isinstance(extra, list):
                tokens += extra
        words = {_token_text(token) for token in tokens}
        return {word for word in words if word is not None}


def is_companion_file(name: str) -> bool:
    """Whether a file of a repository is of those that stand beside a tokenizer."""
    is_template = re.fullmatch(rf"{CHAT_TEMPLATE_FOLDER}/[^/]+\.jinja", name) is not None
    return is_template or name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE_FILE)


def read_companions(folder: Path) -> Companions:
    """Those in a folder, as far as there are any. Errors: UserError for a file that is no JSON object, or no text."""
    config: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):  # what the second says replaces what the first does
        if (folder / name).is_file():
            config |= read_json_object(folder / name)
    config = {key: value for key, value in config.items() if key not in DROPPED_KEYS}
    older, newer = EXTRA_SPECIAL_KEYS
    if isinstance(config.get(newer), list):  # transformers 4 takes no list under the newer word
        config.setdefault(older, config.pop(newer))
    templates = {name: _read_template(folder / name) for name in _list_templates(folder)}
    if templates:  # transformers before 4.48 reads no such files, but this key
        config["chat_template"] = _fold_templates(templates)
    return Companions(config, templates)


def write_companions(companions: Companions, folder: Path, ours: dict[str, Any]) -> None:
    """The files beside a tokenizer.json, with `ours` over what came in."""
    text = json.dumps({**companions.tokenizer_config, **ours}, indent=2, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
    for name, template in companions.templates.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(template, encoding="utf-8", newline="")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, and where it names no end of a text that of config.json, as transformers has it."""
    config: dict[str, Any] = {}
    if (folder / GENERATION_CONFIG).is_file():
        config = read_json_object(folder / GENERATION_CONFIG)
    config = {key: value for key, value in config.items() if key not in ("_from_model_config", "transformers_version")}
    if config.get("eos_token_id") is None and (folder / "config.json").is_file():
        model = read_json_object(folder / "config.json")
        text_model = model.get("text_config")  # of a model that also sees or hears
        config["eos_token_id"] = model.get("eos_token_id")
        if config["eos_token_id"] is None and isinstance(text_model, dict):
            config["eos_token_id"] = text_model.get("eos_token_id")
    return {key: value for key, value in config.items() if value is not None}


def eos_token_ids(generation_config: Mapping[str, Any]) -> list[int]:
    """The ids that end a text by a generation_config.json: there it is one, or a list."""
    value = generation_config.get("eos_token_id")
    return list(dict.fromkeys(_valid_ids(value if isinstance(value, list) else [value])))


def suppressed_token_ids(generation_config: Mapping[str, Any]) -> list[int]:
    """The ids that are never drawn by a generation_config.json."""
    value = generation_config.get("suppress_tokens")
    return _valid_ids(value) if isinstance(value, list) else []


def _valid_ids(values: list[Any]) -> list[int]:
    return [value for value in values if type(value) is int and value >= 0]


def unsupported_generation_settings(generation_config: Mapping[str, Any]) -> list[str]:
    """What a generation_config.json asks for and our own sampling does not do, as KEY=VALUE.

    Values of 0 and 1 are treated as the default of their key, which most are.
    """
    return [
        f"{key}={value}"
        for key, value in generation_config.items()
        if key not in SUPPORTED_GENERATION_KEYS and not key.endswith("_token_id") and value not in (None, 0, 1, [])
    ]


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: UserError if there is none."""
    try:
        value = json.loads(files.read_text_file(file))
    except RecursionError:
        raise _unreadable_error(file, "values nested too deeply", "a JSON object") from None
    except (OSError, ValueError) as error:
        raise _unreadable_error(file, str(error), "a JSON object") from None
    if not isinstance(value, dict):
        raise _unreadable_error(file, f"it holds a {type(value).__name__}", "a JSON object")
    return value


def _list_templates(folder: Path) -> Iterator[str]:
    """The chat template's file, then the further ones."""
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        yield CHAT_TEMPLATE_FILE
    for path in sorted((folder / CHAT_TEMPLATE_FOLDER).glob("*.jinja")):
        if path.is_file():
            yield f"{CHAT_TEMPLATE_FOLDER}/{path.name}"


def _read_template(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            return opened.read()
    except (OSError, ValueError) as error:
        raise _unreadable_error(file, str(error), "text in UTF-8") from None


def _fold_templates(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
    """The templates as tokenizer_config.json holds them: one alone as its text, several by name in a list."""
    if list(templates) == [CHAT_TEMPLATE_FILE]:
        return templates[CHAT_TEMPLATE_FILE]
    named: list[dict[str, str]] = []
    for file, text in templates.items():
        name = "default" if file == CHAT_TEMPLATE_FILE else Path(file).stem
        named.append({"name": name, "template": text})
    return named


def _token_text(token: object) -> str | None:
    word = token.get("content") if isinstance(token, dict) else token
    return word if isinstance(word, str) else None


def _unreadable_error(file: Path, saw: str, want: str) -> UserError:
    return UserError(Problem(f"{file.name} cannot be read", saw, want, str(file)))
