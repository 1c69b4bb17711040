"""Files that survive a crash, records whose damage is seen, and tensors that cannot run code."""

import errno
import hashlib
import json
import os
import pickle
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smoltrain.errors import Problem, TrainingStopped, UserError, format_value

CRC32_MARK = ', "crc32": "'  # before the checksum with which each line of a run's .jsonl ends


def fsync_path(path: Path) -> None:
    """Force a file's or folder's content to the disk (man 2 fsync: a new name needs its folder synced too)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stat_regular_file(path: Path) -> os.stat_result:
    """What the system says of a regular file. Errors: OSError for anything else: a pipe would be read for ever."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return about


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file's bytes, hex. Errors: OSError."""
    stat_regular_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text_file(path: Path) -> str:
    """The text of a regular file. Errors: OSError, and UnicodeDecodeError, which is a ValueError."""
    stat_regular_file(path)
    return path.read_text(encoding="utf-8")


def resolve_inside(folder: Path, name: str, change: str) -> Path:
    """FOLDER/NAME for a name that came out of a file, which may be anybody's: it never leads out of the folder.

    Errors: UserError, blaming `change`, for an absolute or empty name, one with `..`, and one that a symbolic link
    takes elsewhere.
    """
    path = folder / name
    plain = bool(name) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    if not plain or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        want = f"a name that stays within {folder}, without `..` and links"
        raise UserError(Problem("a name leads out of its folder", format_value(name), want, change))
    return path


def write_text_file(path: Path, text: str) -> None:
    """Replace a whole file so that a reader, or a crash, sees either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    commit_file(temporary, path)


def commit_file(written: Path, final: Path) -> None:
    """Rename a written file to its final name: after a power cut it is there whole or not at all."""
    fsync_path(written)
    written.replace(final)
    fsync_path(final.parent)


def write_json_file(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text_file(path, json.dumps(value, indent=1) + "\n")


@dataclass(frozen=True)
class JsonLine:
    """A line of a .jsonl, as it stands there."""

    number: int  # from 1
    raw: bytes  # with its end
    value: dict[str, Any]  # without its checksum; {} where the line is damaged
    fault: str  # what is wrong with it; '' if nothing is


def format_json_line(value: dict[str, Any]) -> str:
    """A line for a .jsonl of a run: ASCII alone, NaN and Infinity as Python writes them, sealed with a CRC-32."""
    text = json.dumps(value)
    return f'{text[:-1]}{CRC32_MARK}{zlib.crc32(text.encode()):08x}"}}\n'


def read_jsonl_lines(path: Path, keys: Sequence[str] = ("step",)) -> Iterator[JsonLine]:
    """Every line of a .jsonl that `json_line` wrote, which must have these keys; none if there is no such file.

    A last one without an end never was, as a crash cut it short. Lines of older versions have no checksum.
    Errors: UserError for a file that cannot be read at all.
    """
    try:
        if path.exists():
            stat_regular_file(path)
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(
            Problem("the records cannot be read", describe_error(error), "a file of lines", str(path))
        ) from None
    *whole, rest = content.split(b"\n")  # bytes end a line at \n alone, where text may have eight other ends
    sealed = False
    for number, text in enumerate(whole, 1):
        raw = text + b"\n"
        value, fault = _parse_jsonl_line(raw, keys, sealed)
        sealed = sealed or CRC32_MARK.encode() in raw
        yield JsonLine(number, raw, value, fault)
    if rest and not _parse_jsonl_line(rest[:-1] + b"\n", keys, sealed=True)[1]:
        yield JsonLine(len(whole) + 1, rest + b"\n", {}, "its end is not what was written")


def _parse_jsonl_line(raw: bytes, keys: Sequence[str], sealed: bool) -> tuple[dict[str, Any], str]:
    """The value of a line, or what is wrong with it. `sealed`: one without a checksum is not whole."""
    head, mark, tail = raw.rpartition(CRC32_MARK.encode())
    text = head + b"}" if mark else raw
    if mark and tail != f'{zlib.crc32(text):08x}"}}\n'.encode():
        return {}, "its checksum differs"
    if sealed and not mark:
        return {}, "it has no checksum"
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError):
        return {}, "it is not JSON"
    missing = [key for key in keys if key not in value] if isinstance(value, dict) else keys
    if missing or ("step" in keys and type(value["step"]) is not int):
        return {}, f"it has no {(*missing, 'step')[0]}"
    return value, ""


def print_warning(text: str) -> None:
    """To whoever reads stderr."""
    print(f"WARNING: {text}", file=sys.stderr)


def read_jsonl(
    path: Path, keys: Sequence[str] = ("step",), say: Callable[[str], None] = print_warning
) -> Iterator[dict[str, Any]]:
    """The values of the lines that are whole; damaged ones are left out, which is said in one line at the end."""
    damaged = []
    for line in read_jsonl_lines(path, keys):
        if line.fault:
            damaged.append(line)
        else:
            yield line.value
    if damaged:
        say(f"{describe_damaged_lines(path, damaged)}; left out")


def describe_damaged_lines(path: Path, damaged: Iterable[JsonLine]) -> str:
    """In one line, where a .jsonl is damaged."""
    first, *others = damaged
    more = f", and {len(others)} more of its lines" if others else ""
    return f"{path}, line {first.number} is damaged ({first.fault}){more}"


def write_tensors(path: Path, tree: Any) -> None:
    """Write a torch file that is on the disk afterwards. Errors: OSError, or RuntimeError of torch's own writer."""
    torch.serialization.set_crc32_options(False)  # 4 of 5 seconds; who writes these files hashes them too
    try:
        with path.open("wb") as file:
            torch.save(tree, file)
    except RuntimeError as error:  # torch's writer hides the system's own words
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    fsync_path(path)


def describe_error(error: BaseException) -> str:
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
