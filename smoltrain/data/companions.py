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

CONFIG, MAP, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE = ("additional_special_tokens", "extra_special_tokens")  # the words of transformers 4 and 5 for those without role
# Not handed on: places on the machine of before, code that does not come along, and what adds tokens to a text.
LEFT_OUT = (
    *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "is_local", "backend"),
    *("auto_map", "processor_class", "add_bos_token", "add_eos_token"),
)

# Keys of generation_config.json that our own sampling follows, or that mean nothing to it.
DONE = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "suppress_tokens", "use_cache")


@dataclass(frozen=True)
class Companions:
    """What came beside a tokenizer.json."""

    about: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    templates: Mapping[str, str] = field(default_factory=dict)  # file -> text

    def word(self, role: str) -> str | None:
        """The token of a role; files hold it as text or as an object."""
        return _word(self.about.get(role))

    @property
    def special(self) -> set[str]:
        """Every token that has a role, or is named as special without one."""
        words = [self.about.get(role) for role in ROLES]
        for key in MORE:
            named = self.about.get(key)
            words += named.values() if isinstance(named, dict) else named if isinstance(named, list) else ()
        return {word for x in words if (word := _word(x)) is not None}


def is_one(name: str) -> bool:
    """Whether a file of a repository is of those that stand beside a tokenizer."""
    return name in (CONFIG, MAP, TEMPLATE) or re.fullmatch(rf"{TEMPLATES}/[^/]+\.jinja", name) is not None


def read(folder: Path) -> Companions:
    """Those in a folder, as far as there are any. Errors: UserError for a file that is no JSON object, or no text."""
    about = (read_object(folder / MAP) if (folder / MAP).is_file() else {}) | (
        read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    )
    about = {key: value for key, value in about.items() if key not in LEFT_OUT}
    if isinstance(about.get(MORE[1]), list):  # transformers 4 takes no list under the newer word
        about.setdefault(MORE[0], about.pop(MORE[1]))
    templates = {name: _text(folder / name) for name in _templates(folder)}
    if templates:  # transformers before 4.48 reads no such files
        named = [{"name": Path(name).stem, "template": text} for name, text in templates.items() if name != TEMPLATE]
        default = templates.get(TEMPLATE)
        named = [{"name": "default", "template": default}, *named] if default is not None and named else named
        about["chat_template"] = named or default
    return Companions(about, templates)


def write(companions: Companions, folder: Path, ours: dict[str, Any]) -> None:
    """The files beside a tokenizer.json, with `ours` over what came in."""
    text = json.dumps({**companions.about, **ours}, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    for name, template in companions.templates.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(template, encoding="utf-8", newline="")


def generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, and where it names no end of a text that of config.json, as transformers has it."""
    file, model = folder / GENERATION, folder / "config.json"
    about = read_object(file) if file.is_file() else {}
    about = {key: value for key, value in about.items() if key not in ("_from_model_config", "transformers_version")}
    if about.get("eos_token_id") is None and model.is_file():
        values = read_object(model)
        text = values.get("text_config")  # of a model that also sees or hears
        parts = [values, text if isinstance(text, dict) else {}]
        about["eos_token_id"] = next((end for part in parts if (end := part.get("eos_token_id")) is not None), None)
    return {key: value for key, value in about.items() if value is not None}


def end_ids(about: Mapping[str, Any]) -> list[int]:
    """The ids that end a text by a generation_config.json: there it is one, or a list."""
    said = about.get("eos_token_id")
    ids = [i for i in (said if isinstance(said, list) else [said]) if type(i) is int and i >= 0]
    return list(dict.fromkeys(ids))


def suppressed_ids(about: Mapping[str, Any]) -> list[int]:
    """The ids that are never drawn by a generation_config.json."""
    said = about.get("suppress_tokens")
    return [i for i in said if type(i) is int and i >= 0] if isinstance(said, list) else []


def not_done(about: Mapping[str, Any]) -> list[str]:
    """What a generation_config.json asks for and our own sampling does not do; a value of 0 or 1 asks for nothing."""
    kept = {key: value for key, value in about.items() if key not in DONE and not key.endswith("_token_id")}
    return [f"{key}={value}" for key, value in kept.items() if value not in (None, 0, 1, [])]


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: UserError if there is none."""
    try:
        value = json.loads(files.read_text(file))
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(Problem(f"{file.name} cannot be read", str(error), "a JSON object", str(file))) from None
    except RecursionError:
        saw = "values nested too deeply"
        raise UserError(Problem(f"{file.name} cannot be read", saw, "a JSON object", str(file))) from None
    return value


def _templates(folder: Path) -> Iterator[str]:
    if (folder / TEMPLATE).is_file():
        yield TEMPLATE
    yield from sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())


def _text(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            return opened.read()
    except (OSError, ValueError) as error:
        raise UserError(Problem(f"{file.name} cannot be read", str(error), "text in UTF-8", str(file))) from None


def _word(token: object) -> str | None:
    word = token.get("content") if isinstance(token, dict) else token
    return word if isinstance(word, str) else None
