"""Files that survive a crash and tensors that cannot run code."""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from smoltrain.errors import TrainingStopped


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk (man 2 fsync: a new name needs its folder synced too)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a whole file so that a reader, or a crash, sees either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    commit(temporary, path)


def commit(written: Path, final: Path) -> None:
    """Rename a written file to its final name: after a power cut it is there whole or not at all."""
    sync(written)
    written.replace(final)
    sync(final.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl; none if there is no such file. A last one that a crash cut short never was."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from (json.loads(line) for line in file if line.endswith("}\n"))


def write_tensors(path: Path, tree: Any) -> None:
    """Write a torch file that is on the disk afterwards. Errors: OSError, or RuntimeError of torch's own writer."""
    torch.serialization.set_crc32_options(False)  # 4 of 5 seconds; who writes these files hashes them too
    try:
        with path.open("wb") as file:
            torch.save(tree, file)
    except RuntimeError as error:  # torch's writer hides the system's own words
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    sync(path)


def reason(error: BaseException) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def read_tensors(path: Path, allowed: Sequence[type] = ()) -> Any:
    """Load a torch file with weights_only=True: plain containers, tensors and the `allowed` classes, nothing else.

    Errors: TrainingStopped naming the file and the class or function that was refused, or what is broken in it; no
    code of the file has run.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a broken file: RuntimeError, OSError, KeyError, ...
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise TrainingStopped(f"{path} holds more than tensors and is refused: {refused[1]}") from None
        reason = str(error).strip().partition("\n")[0] or "it ends too early"
        raise TrainingStopped(f"{path} is broken and cannot be read: {type(error).__name__}, {reason}") from None
