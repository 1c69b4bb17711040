"""A program's own documents as the data of a run: written once into the run's folder, then read like any source.

So resume, ledger and verify hold for them, and the command line can go on with the run.
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smoltrain.config.rules import find_contradictions
from smoltrain.config.schema import Config, DataSection, SourceSection
from smoltrain.errors import Problem, UserError, abbreviate_list, format_value
from smoltrain.files import file_sha256
from smoltrain.run.run_lock import hold_run_lock

DOCUMENTS_FILE = "documents.jsonl"  # in a run's folder


def write_documents(config: Config, documents: Iterable[str]) -> Config:
    """Write the texts into the run's folder, if they are not there; the config with them as its data.

    Errors: UserError for what is no text, for no document at all, for documents that are not those of the run's first
    start, and for what does not fit the rest of the config.
    """
    _check_iterable(documents)
    path = config.run_folder / DOCUMENTS_FILE
    own = {name: getattr(config.data, name) for name in DataSection.model_fields if name not in _source_keys()}
    config = config.model_copy(update={"data": DataSection(path=str(path), **own)})
    if problems := find_contradictions(config):
        raise UserError(*problems)
    with hold_run_lock(config):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_once(path, documents)
    return config


def _check_iterable(documents: Any) -> None:
    """Errors: UserError for what is not iterated text by text: a single one, a path, a table that gives its names."""
    want = "texts, in a list say"
    if isinstance(documents, str):
        raise UserError(Problem("documents is one text", format_value(documents), want, "documents"))
    if not isinstance(documents, Iterable):
        raise UserError(Problem("documents cannot be iterated", format_value(documents), want, "documents"))
    keys: Any = getattr(documents, "keys", None)  # of a dict, a DataFrame; a Series has them too, and gives its values
    if callable(keys):
        names = list(documents)
        given: Any = keys()
        if names == list(given):
            saw = f"{type(documents).__name__} with {abbreviate_list(list(map(str, names)))}"
            raise UserError(Problem("documents gives names, not texts", saw, f"{want}, or one column", "documents"))


def _source_keys() -> set[str]:
    """What describes where documents come from, as against what is done with them."""
    return {*SourceSection.model_fields, "sources"}


def _write_once(path: Path, documents: Iterable[str]) -> None:
    """Errors: as `write_documents`, and whatever the iterable raises. The file is then as it was."""
    temporary = path.with_suffix(".tmp")
    try:
        count = 0
        with temporary.open("w", encoding="utf-8") as file:
            for count, text in enumerate(documents, start=1):
                if not isinstance(text, str):
                    what = f"document {count} is no text"
                    raise UserError(Problem(what, f"{type(text).__name__} {format_value(text)}", "a str", "documents"))
                file.write(json.dumps({"text": text}) + "\n")  # ASCII alone, so that no text is refused here
        if not count:
            raise UserError(Problem("there are no documents", "an empty iterable", "at least one text", "documents"))
        if not path.exists():
            temporary.replace(path)
        elif file_sha256(temporary) != file_sha256(path):
            want = f"those of its first start, which are in {path}"
            change = "documents, or run.name for another run"
            raise UserError(Problem("the documents are not those of the run", "other texts", want, change))
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
