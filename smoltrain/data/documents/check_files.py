"""What names, sizes and first bytes tell about the files of a new run, before anything slow is done with them."""

import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents.file_systems import url_protocol
from smoltrain.data.documents.folders import first_wildcard
from smoltrain.data.documents.listing import SourceListing, has_own_validation, source_config_key
from smoltrain.data.documents.magic_bytes import MAX_POINTER_BYTES, Pointer, detect_pointer
from smoltrain.data.documents.readers import format_suffix, has_fields, read_head, strip_compression
from smoltrain.data.documents.shard import Shard, open_shard, report_unreadable
from smoltrain.errors import Problem, UserError, abbreviate_list
from smoltrain.files import expand_home

SEPARATOR_SEARCH_BYTES = 2**20  # of a whole file, in which its separator is looked for
SEPARATOR_SEARCH_FILES = 20  # files that are looked into
SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}


def check_source_files(listed: dict[str, SourceListing], data: DataSection) -> list[str]:
    """Lines to be printed about the files. Errors: UserError where pointers lie in place of files."""
    lines: list[str] = []
    for part in data.parts:
        listing = listed[part.name]
        check_no_pointers(listing.all_shards, part.name)
        lines += listing.exclusion_notes
        splits = find_evaluation_splits(shard.name for shard in listing.shards)
        if splits:
            lines.append(_describe_splits(part.name, splits))
        texts = find_files_with_separator(part, listing.all_shards)
        if texts:
            key = f"{source_config_key(part.name, data)}.documents"
            where = f"{part.document_separator!r} stands in {abbreviate_list(texts)}"
            lines.append(f"{where}: {key}=separator would cut the documents there")
    return lines


def describe_missing_data(data: DataSection) -> list[str]:
    """The paths on this machine that are not there, and the packages that are not installed, each with its key.

    Nothing is listed: a folder may have a million files. What is elsewhere is not asked for.
    """
    missing: list[str] = []
    for part in data.parts:
        key = source_config_key(part.name, data)
        if part.package is not None and not _is_installed(part.package):
            missing.append(f"{key}.package {part.package} is not installed")
        for name, path in (("path", part.path), ("validation_path", part.validation_path)):
            if path is not None and url_protocol(path) in (None, "file") and not _is_there(path):
                missing.append(f"{key}.{name} {path} is not on this machine")
    return missing


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package.partition(".")[0]) is not None  # of a top-level name, without running anything of it
    except (ImportError, ValueError):
        return False


def _is_there(path: str) -> bool:
    """Whether a path of this machine is; of a glob, the folder that it searches."""
    parts = expand_home(path.removeprefix("file://")).parts
    return Path(*parts[: first_wildcard(parts)]).exists()


def check_no_pointers(shards: Iterable[Shard], source: str) -> None:
    """Errors: UserError if files on this machine are pointers of git-lfs or git-annex to the files themselves."""
    pointers: list[tuple[Shard, Pointer]] = []
    for shard in shards:
        if shard.is_local and (shard.size or 0) < MAX_POINTER_BYTES:
            pointer = detect_pointer(_read_small_file(shard))
            if pointer is not None:
                pointers.append((shard, pointer))
    if not pointers:
        return
    first, pointer = pointers[0]
    are = f"file of {source!r} is a pointer" if len(pointers) == 1 else f"files of {source!r} are pointers"
    what = f"{len(pointers):,} {are} of {pointer.tool}, not the data"
    names = abbreviate_list([shard.name for shard, _ in pointers])
    want = f"the files: `{pointer.command}` in their folder"
    raise UserError(Problem(what, names, want, str(Path(first.place).parent)))


def find_evaluation_splits(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split that a folder or the name says they are of; {} unless one is for evaluation and others not."""
    by_split: dict[str | None, list[str]] = {}
    for name in names:
        by_split.setdefault(_guess_split(name), []).append(name)
    evaluation = {split: by_split[split] for split in ("test", "validation") if split in by_split}
    return evaluation if len(by_split) > 1 else {}


def find_files_with_separator(
    part: MixedSource, shards: Iterable[Shard], opener: Callable[[Shard], BinaryIO] | None = None
) -> list[str]:
    """The names of files that are to be one document each, and hold the text that parts documents elsewhere.

    Only the first files are looked into; without an `opener` only those that lie on this machine.
    """
    if part.documents != "file":
        return []
    separator = part.document_separator.encode()
    texts = [shard for shard in shards if not has_fields(shard.name) and (shard.is_local or opener)]
    head_opener = opener or open_shard
    return [shard.name for shard in texts[:SEPARATOR_SEARCH_FILES] if separator in _read_text_head(shard, head_opener)]


def check_enough_documents(listed: dict[str, SourceListing], data: DataSection, num_streams: int) -> None:
    """Errors: UserError for a source of whole files that are fewer than it needs documents to be streamed."""
    for part in data.parts:
        shards = listed[part.name].shards
        if part.documents != "file" or any(has_fields(shard.name) for shard in shards):
            continue
        if has_own_validation(part):
            needed = num_streams
            want = f"at least {needed}"
        else:
            needed = num_streams + 1
            want = f"at least {needed}, one per stream and one held out"
        if len(shards) < needed:
            how = "separator" if find_files_with_separator(part, shards) else "blank_lines or separator"
            what = f"the source {part.name!r} has fewer documents than streams"
            change = f"{source_config_key(part.name, data)}.documents={how}, or data.streams, or data.mode=cached"
            raise UserError(Problem(what, f"{len(shards)}, as each file is one", want, change))


def _guess_split(name: str) -> str | None:
    """The split that a file is of; None where nothing says so. A folder says it by its name, a file by a word in it."""
    *folders, file = PurePosixPath(strip_compression(name.lower())).parts
    stem = file.removesuffix(format_suffix(file))
    stem = re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?$", "", stem)  # the number of a shard, as in -00000-of-00001
    words = re.split(r"[-_. ]+", stem)
    dotted = stem.split(".")[-2:]  # as in wiki.valid.tokens
    telling = {*folders, *dotted, words[0], words[-1]}
    for split, its_words in SPLIT_WORDS.items():
        if not telling.isdisjoint(its_words):
            return split
    return None


def _describe_splits(source: str, splits: dict[str, list[str]]) -> str:
    """A warning."""
    each = " and ".join(f"{len(names):,} of {split} ({abbreviate_list(names)})" for split, names in splits.items())
    return (
        f"warning: files of {source} seem to be for evaluation and are trained on like the others: {each};"
        " data.validation_path holds them out, data.pattern leaves them out"
    )


def _read_small_file(shard: Shard) -> bytes:
    """Errors: UserError if it cannot be read."""
    with report_unreadable(shard):
        return Path(shard.url).read_bytes()


def _read_text_head(shard: Shard, opener: Callable[[Shard], BinaryIO]) -> bytes:
    """The first bytes of what a file of text holds. Errors: UserError if it cannot be read."""
    with report_unreadable(shard), opener(shard) as file:
        return read_head(shard, file, SEPARATOR_SEARCH_BYTES)
