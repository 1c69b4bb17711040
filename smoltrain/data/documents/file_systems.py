"""File systems behind URLs, as fsspec opens them; and what their answers and their errors mean."""

import functools
import os
from typing import Any

import fsspec

from smoltrain.errors import exception_message, iterate_causes

HTTP_STALL_S = 25.0  # without a byte from an http server, after which it has failed to answer
FileInfo = dict[str, Any]  # what a file system tells about a file


def url_protocol(url: str) -> str | None:
    """What stands before `://`; None of a path of this machine."""
    protocol, separator, _ = url.partition("://")
    return protocol.lower() if separator and protocol.isalnum() else None


def get_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URL, and the URL's path within it. Errors: ImportError, ValueError for the protocol."""
    system = _make_file_system(url_protocol(url) or "file", os.getpid(), HTTP_STALL_S)
    return system, str(system._strip_protocol(url))


@functools.cache
def _make_file_system(
    protocol: str,
    pid: int,  # noqa: ARG001 (part of the cache's key: a forked process must not share its parent's connections)
    stall_s: float,
) -> fsspec.AbstractFileSystem:
    """One for all threads, where fsspec's own cache would keep one for each, for ever.

    What it lists is remembered for the Hub alone, where a commit's files cannot change.
    """
    if protocol == "hf":
        return fsspec.filesystem("hf", skip_instance_cache=True)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("http", "https"):
        import aiohttp  # a sixth of a second that files on a disk do not need

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # HTTPS_PROXY and its like count
        options["headers"] = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file itself
    return fsspec.filesystem(protocol, **options)


def file_version(info: FileInfo) -> str:
    """By what a changed file is known, from the keys that the file systems of fsspec use."""
    for key in ("ETag", "etag"):
        if info.get(key):
            return f"etag {info[key]}"
    for key in ("Last-Modified", "LastModified", "updated", "created"):
        if info.get(key):
            return f"modified {info[key]}"
    return "size only"


def http_status(error: BaseException) -> int | None:
    """The status of the HTTP answer that an error or one of its causes is about."""
    for cause in iterate_causes(error):
        response = getattr(cause, "response", None)
        for status in (getattr(cause, "status", None), getattr(response, "status_code", None)):
            if isinstance(status, int):
                return status
    return None


def is_missing_file(error: BaseException) -> bool:
    """Whether there is no such file, rather than no answer."""
    import aiohttp

    status = http_status(error)
    if status is not None:
        return status in (404, 410)
    # fsspec's http raises FileNotFoundError for a server that does not answer too: its causes tell which it was.
    causes = [cause for cause in iterate_causes(error) if not isinstance(cause, FileNotFoundError)]
    unanswered = any(isinstance(cause, (OSError, aiohttp.ClientError)) for cause in causes)
    return isinstance(error, FileNotFoundError) and not unanswered


def describe_read_error(error: BaseException) -> str:
    """What went wrong with a file system, in a few words on one line."""
    status = http_status(error)
    if status is not None:
        return f"HTTP {status}"
    *_, cause = iterate_causes(error)
    if isinstance(cause, TimeoutError):
        return f"no answer within {HTTP_STALL_S:g} s"
    if isinstance(cause, FileNotFoundError):
        return f"no such file: {exception_message(cause)}"
    return exception_message(cause)
