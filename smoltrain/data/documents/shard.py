"""One file of documents: its name, where it lies, which version it is, and how it is opened."""

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec

from smoltrain.errors import Problem, UserError

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".ndjson", ".parquet")
RECORD_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")  # a document is a record's text_field
COMPRESSED = (".gz", ".zst")  # behind any suffix but .parquet, which compresses its own columns
WANT_SUFFIX = f"{' or '.join(SUFFIXES)}, or all but the last with {' or '.join(COMPRESSED)} behind it"
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def format_suffix(name: str) -> str:
    """The suffix that says how to read a file: the one before .gz or .zst, if it has such."""
    *_, before, last = ("", "", *(suffix.lower() for suffix in PurePosixPath(name).suffixes))
    return before if last in COMPRESSED and before != ".parquet" else last


def strip_compression(name: str) -> str:
    """The name of a readable file without the .gz or .zst behind it."""
    last = PurePosixPath(name).suffix
    return name.removesuffix(last) if last.lower() in COMPRESSED and format_suffix(name) in SUFFIXES else name


def printable_name(name: str) -> str:
    r"""A name on one line that can be printed and written: bytes that are no UTF-8 as \xe9, line ends as \n."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return CONTROL_CHARACTERS.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


HTTP_STALL_S = 25.0  # without a byte from an http server, after which it has failed to answer
FileInfo = dict[str, Any]  # what a file system tells about a file


@dataclass(frozen=True)
class Shard:
    """One file of documents."""

    name: str  # by which its documents are known
    url: str  # a local path, or a URL of any protocol of fsspec
    size: int | None  # bytes
    version: str  # "mtime N" (ns) of a local file; "etag X", else "modified X", else "size only" of a URL; "commit SHA"

    @property
    def is_local(self) -> bool:
        """Whether it is read from this machine's own file systems, where a fault is no matter of patience."""
        return url_protocol(self.url) is None

    @property
    def place(self) -> str:
        """The url as a message shows it."""
        return printable_name(self.url)


def hash_shard(shard: Shard) -> str:
    """SHA-256 of all of a local file's bytes (about 1 GB/s): a size or a time stamp does not prove that it is the same.

    Errors: UserError if it cannot be read.
    """
    try:
        with Path(shard.url).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable_file_error(error, shard.place) from None


def open_shard(shard: Shard) -> BinaryIO:
    """The shard's bytes, seekable. Each `read` of a remote one is one request, and may fail or come back short."""
    if shard.is_local:
        return Path(shard.url).open("rb")
    system, path = get_file_system(shard.url)
    return cast(BinaryIO, system.open(path, "rb", cache_type="none", size=shard.size))


def stat_shard(shard: Shard) -> tuple[int | None, str]:
    """Size and version of the shard as it stands now. A commit's files stand for ever. Errors: its file system's."""
    if shard.version.startswith("commit "):
        return shard.size, shard.version
    if shard.is_local:
        about = Path(shard.url).stat()
        return about.st_size, f"mtime {about.st_mtime_ns}"
    system, path = get_file_system(shard.url)
    info = system.info(path)
    return info["size"], file_version(info)


def get_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URL, and the URL's path within it. Errors: ImportError, ValueError for the protocol."""
    system = _make_file_system(url_protocol(url) or "file", os.getpid(), HTTP_STALL_S)
    return system, str(system._strip_protocol(url))


@functools.cache
def _make_file_system(protocol: str, pid: int, stall_s: float) -> fsspec.AbstractFileSystem:  # noqa: ARG001 (a fork's is its own)
    """One for all threads, where fsspec's own cache would keep one for each, for ever.

    What it lists is remembered for the Hub alone, where a commit's files cannot change.
    """
    if protocol == "hf":
        return fsspec.filesystem("hf", skip_instance_cache=True)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("http", "https"):
        import aiohttp  # a sixth of a second that files on a disk do not need

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        options |= {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # HTTPS_PROXY and its like count
        options |= {"headers": {"Accept-Encoding": "identity"}}  # sizes and ranges are those of the file itself
    return fsspec.filesystem(protocol, **options)


def http_status(error: BaseException) -> int | None:
    """The status of the HTTP answer that an error or one of its causes is about."""
    for cause in _iterate_causes(error):
        for status in (getattr(cause, "status", None), getattr(getattr(cause, "response", None), "status_code", None)):
            if isinstance(status, int):
                return status
    return None


def is_missing_file(error: BaseException) -> bool:
    """Whether there is no such file, rather than no answer (which fsspec's http calls FileNotFoundError too)."""
    import aiohttp

    if (status := http_status(error)) is not None:
        return status in (404, 410)
    last = [*_iterate_causes(error)][-1]
    unanswered = isinstance(last, (OSError, aiohttp.ClientError)) and not isinstance(last, FileNotFoundError)
    return isinstance(error, FileNotFoundError) and not unanswered


def describe_read_error(error: BaseException) -> str:
    """What went wrong with a file system, in a few words on one line."""
    if (status := http_status(error)) is not None:
        return f"HTTP {status}"
    last = [*_iterate_causes(error)][-1]
    if isinstance(last, TimeoutError):
        return f"no answer within {HTTP_STALL_S:g} s"
    return (
        f"no such file: {exception_message(last)}" if isinstance(last, FileNotFoundError) else exception_message(last)
    )


def unreadable_file_error(error: OSError, place: str) -> UserError:
    """The system's refusal of a local file."""
    return UserError(Problem("the file cannot be read", exception_message(error), "a readable file", place))


def exception_message(error: BaseException) -> str:
    """What an exception says, for a problem; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what caused it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def url_protocol(url: str) -> str | None:
    """What stands before `://`; None of a path of this machine."""
    protocol, separator, _ = url.partition("://")
    return protocol.lower() if separator and protocol.isalnum() else None


def file_version(info: FileInfo) -> str:
    """By what a changed file is known, from the keys that the file systems of fsspec use."""
    etags = [info[key] for key in ("ETag", "etag") if info.get(key)]
    times = [info[key] for key in ("Last-Modified", "LastModified", "updated", "created") if info.get(key)]
    return f"etag {etags[0]}" if etags else f"modified {times[0]}" if times else "size only"
