"""Files: atomic writes, .jsonl lines with checksums, and torch.load with weights_only.

A write is atomic by a rename: a reader, or a crash, sees either the old file or the new one, whole. torch is imported
where tensors are written or read: whoever only looks at a run's records does not wait for it.
"""

import contextlib
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

from smoltrain.errors import Problem, TrainingStopped, UserError, format_value

METRICS_FILE = "metrics.jsonl"  # in a run folder: one line for each step, and more for what is measured now and then
CRC32_MARK = ', "crc32": "'  # before the checksum with which each line of a run's .jsonl ends


def user_cache_folder() -> Path:
    """Where what is made once for all runs of a user is kept: $SMOLTRAIN_CACHE or ~/.cache/smoltrain."""
    chosen = os.environ.get("SMOLTRAIN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "smoltrain"


def expand_home(path: str | Path) -> Path:
    """The path with the folder of its user in place of ~, which Path.expanduser does too, and raises for ~nobody."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def name_missing_path(path: Path) -> str:
    """The path, and in which folder it was looked for if it does not say so: train.sh changes into its own."""
    return str(path) if path.is_absolute() else f"{path} in {Path.cwd()}"


def fsync_path(path: Path) -> None:
    """Force a file's or folder's content to the disk (man 2 fsync: a new name needs its folder synced too)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stat_regular_file(path: Path) -> os.stat_result:
    """The stat of a regular file. Errors: OSError for anything else: reading a pipe would never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return status


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
    is_plain = bool(name) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    if is_plain and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return path
    raise UserError(
        Problem(
            what="a name leads out of its folder",
            saw=format_value(name),
            want=f"a name that stays within {folder}, without `..` and links",
            change=change,
        )
    )


@contextlib.contextmanager
def name_file(path: Path) -> Iterator[None]:
    """An OSError in the block gets this name if it has none: write(2), which meets a full disk, knows no names."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else it is a library's own, which says it in its own words
            error.filename = error.filename or str(path)
        raise


def write_text_file(path: Path, text: str) -> None:
    """Replace a whole file so that a reader, or a crash, sees either the old or the new one.

    Errors: OSError, after which nothing is left of the new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with name_file(path):
            temporary.write_text(text, encoding="utf-8")
            commit_file(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def give_default_mode(path: Path) -> None:
    """Give a file the permissions that a new one gets in its folder, by umask and access lists."""
    new = path.with_name(f"{path.name}.mode")
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    path.chmod(mode)


def commit_file(written: Path, final: Path) -> None:
    """Rename a written file to its final name: after a power cut it is there whole or not at all."""
    fsync_path(written)
    written.replace(final)
    fsync_path(final.parent)


def write_json_file(path: Path, value: Any) -> None:
    """Replace a whole file by a value as indented JSON, atomically."""
    write_text_file(path, json.dumps(value, indent=1) + "\n")


def seal_json(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The tree with the digest of all else that is in it under `key`."""
    rest = {name: value for name, value in tree.items() if name != key}
    return rest | {key: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


@dataclass(frozen=True)
class JsonLine:
    """A line of a .jsonl, as it stands there."""

    number: int  # from 1
    raw: bytes  # with its end
    value: dict[str, Any]  # without its checksum; {} where the line is damaged
    fault: str | None  # what is wrong with it


def format_json_line(value: dict[str, Any]) -> str:
    """A line for a .jsonl of a run: ASCII alone, NaN and Infinity as Python writes them, sealed with a CRC-32."""
    text = json.dumps(value)
    return f'{text[:-1]}{CRC32_MARK}{zlib.crc32(text.encode()):08x}"}}\n'


def read_jsonl_lines(path: Path, keys: Sequence[str] = ("step",)) -> Iterator[JsonLine]:
    """Every line of a .jsonl that `format_json_line` wrote, which must have these keys; none if there is no such file.

    An unterminated last line is a write that a crash cut short, and is skipped. Lines of older versions have no
    checksum. One line is in memory at a time. Errors: UserError for a file that cannot be read at all.
    """
    sealed = False
    for number, raw in enumerate(_read_raw_lines(path), 1):
        if raw.endswith(b"\n"):
            value, fault = _parse_json_line(raw, keys, sealed)
            sealed = sealed or CRC32_MARK.encode() in raw
            yield JsonLine(number, raw, value, fault)
        # A crash loses bytes at the end. A whole line whose last byte alone is another one was damaged, not cut short.
        elif _parse_json_line(raw[:-1] + b"\n", keys, sealed=True)[1] is None:
            yield JsonLine(number, raw + b"\n", {}, "its end is not what was written")


def _read_raw_lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends, which is \\n alone: text may have eight other ones."""
    try:
        if path.exists():
            stat_regular_file(path)
            with path.open("rb") as file:
                yield from file
    except OSError as error:
        problem = Problem("the records cannot be read", describe_error(error), "a file of lines", str(path))
        raise UserError(problem) from None


def _parse_json_line(raw: bytes, keys: Sequence[str], sealed: bool) -> tuple[dict[str, Any], str | None]:
    """(value, None) of a sound line, ({}, what is wrong) of a damaged one. `sealed`: it must have a checksum."""
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
    missing = [key for key in keys if key not in value] if isinstance(value, dict) else list(keys)
    if missing:
        return {}, f"it has no {missing[0]}"
    if "step" in keys and type(value["step"]) is not int:
        return {}, "it has no step"
    return value, None


def parse_jsonl(content: bytes, keys: Sequence[str] = ("step",)) -> list[dict[str, Any]]:
    """The values of the sound lines in a piece of a .jsonl that begins with a line; one without an end is left out."""
    *whole, _ = content.split(b"\n")
    values: list[dict[str, Any]] = []
    for text in whole:
        value, fault = _parse_json_line(text + b"\n", keys, sealed=False)
        if fault is None:
            values.append(value)
    return values


@contextlib.contextmanager
def report_unwritable(what: str, want: str, change: str) -> Iterator[None]:
    """Errors: UserError in place of an OSError of the block, which writes `what` for the user."""
    try:
        yield
    except OSError as error:  # a full disk, another's folder
        raise UserError(Problem(f"{what} cannot be written", describe_error(error), want, change)) from None


def print_warning(text: str) -> None:
    """Print a warning on stderr."""
    print(f"WARNING: {text}", file=sys.stderr)


def read_jsonl(
    path: Path, keys: Sequence[str] = ("step",), say: Callable[[str], None] = print_warning
) -> Iterator[dict[str, Any]]:
    """The values of the sound lines; damaged ones are left out, which is said in one line at the end."""
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


def keep_jsonl_lines(path: Path, lines: Iterable[JsonLine]) -> None:
    """Cut a .jsonl down to these of its lines; a last one that a crash cut short goes with the others."""
    kept = b"".join(line.raw for line in lines)
    if path.exists() and path.stat().st_size != len(kept):
        write_text_file(path, kept.decode())


def write_tensors(path: Path, tree: Any, allowed: Sequence[type] = ()) -> None:
    """Write a torch file that is on the disk afterwards, and that `read_tensors` takes with the same `allowed`.

    Errors: OSError, or RuntimeError of torch's own writer; TypeError for what would be refused when it is read, which
    depends on the versions of Python and of libraries too.
    """
    import torch

    torch.serialization.set_crc32_options(False)  # 4 of 5 seconds; who writes these files hashes them too
    try:
        with path.open("wb") as file:
            torch.save(tree, file)
    except RuntimeError as error:  # torch's writer hides the system's own words
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    names = {f"{one.__module__}.{one.__qualname__}" for one in allowed}
    refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - names
    if refused:
        raise TypeError(f"{path} would hold more than tensors: {', '.join(sorted(refused))}")
    fsync_path(path)


def describe_error(error: BaseException) -> str:
    """In one line: what the system says of an OSError, kind and first line of any other error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {first_line(error) or 'no reason given'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; '' if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def exception_title(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it says nothing."""
    return first_line(error) or type(error).__name__


def read_tensors(path: Path, allowed: Sequence[type] = ()) -> Any:
    """Load a torch file with weights_only=True: plain containers, tensors and the `allowed` classes, nothing else.

    Errors: TrainingStopped naming the file and the class or function that was refused, or what is broken in it; no
    code of the file has run.
    """
    import torch

    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a broken file: RuntimeError, OSError, KeyError, ...
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise TrainingStopped(f"{path} holds more than tensors and is refused: {refused[1]}") from None
        reason = first_line(error) or "it ends too early"
        raise TrainingStopped(f"{path} is broken and cannot be read: {type(error).__name__}, {reason}") from None
