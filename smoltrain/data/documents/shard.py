"""One file of documents: its name, where it lies, which version it is, and how it is opened."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from smoltrain import files
from smoltrain.data.documents.file_systems import file_version, get_file_system, url_protocol
from smoltrain.errors import Problem, UserError, exception_message

CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class FileVersion(NamedTuple):
    """By what a changed file is known."""

    size: int | None  # bytes
    version: str  # as Shard.version


@dataclass(frozen=True)
class Shard:
    """One file of documents."""

    name: str  # by which its documents are known
    url: str  # a local path, or a URL of any protocol of fsspec
    size: int | None  # bytes
    version: str  # "mtime N" (ns) of a local file; "etag X", else "modified X", else "size only" of a URL; "commit SHA"

    @property
    def is_local(self) -> bool:
        """Whether it is read from this machine's own file systems, where no fault passes by itself."""
        return url_protocol(self.url) is None

    @property
    def place(self) -> str:
        """The url as a message shows it."""
        return printable_name(self.url)


def printable_name(name: str) -> str:
    r"""A name on one line that can be printed and written: bytes that are no UTF-8 as \xe9, line ends as \n."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def open_shard(shard: Shard) -> BinaryIO:
    """The shard's bytes, seekable. Each `read` of a remote one is one request, and may fail or come back short."""
    if shard.is_local:
        return Path(shard.url).open("rb")
    system, path = get_file_system(shard.url)
    return cast(BinaryIO, system.open(path, "rb", cache_type="none", size=shard.size))


def stat_shard(shard: Shard) -> FileVersion:
    """Size and version of the shard as it stands now. Errors: those of its file system."""
    if shard.version.startswith("commit "):  # a commit's files stand for ever
        return FileVersion(shard.size, shard.version)
    if shard.is_local:
        stat = Path(shard.url).stat()
        return FileVersion(stat.st_size, f"mtime {stat.st_mtime_ns}")
    system, path = get_file_system(shard.url)
    info = system.info(path)
    return FileVersion(info["size"], file_version(info))


def hash_shard(shard: Shard) -> str:
    """SHA-256 of all of a local file's bytes (about 1 GB/s): neither size nor time proves that it is the same.

    Errors: UserError if it cannot be read.
    """
    with report_unreadable(shard):
        return files.file_sha256(Path(shard.url))


@contextlib.contextmanager
def report_unreadable(shard: Shard) -> Iterator[None]:
    """Errors: UserError where the system refuses a local file."""
    try:
        yield
    except OSError as error:
        problem = Problem("the file cannot be read", exception_message(error), "a readable file", shard.place)
        raise UserError(problem) from None
