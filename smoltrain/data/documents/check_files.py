"""What names, sizes and first bytes tell about the files of a new run, before anything slow is done with them."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents.file_kinds import abbreviate_names
from smoltrain.data.documents.listing import SourceListing, has_own_validation
from smoltrain.data.documents.magic_bytes import MAX_POINTER_BYTES, detect_pointer
from smoltrain.data.documents.readers import read_head
from smoltrain.data.documents.shard import RECORD_SUFFIXES, Shard, format_suffix, unreadable_file_error
from smoltrain.errors import Problem, UserError

SEPARATOR_SEARCH_BYTES = 2**20  # of a whole file, in which its separator is looked for
SEPARATOR_SEARCH_FILES = 20  # files that are looked into
SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}


def check_source_files(listed: dict[str, SourceListing], data: DataSection) -> list[str]:
    """Lines to be said about the files. Errors: UserError where pointers lie in place of files."""
    lines = []
    for part in data.parts:
        listing = listed[part.name]
        check_no_pointers(listing.all, part.name)
        lines += listing.exclusion_notes
        if splits := find_evaluation_splits(shard.name for shard in listing.shards):
            lines.append(_describe_splits(part.name, splits))
        if texts := find_files_with_separator(part, listing.all):
            separator, key = part.document_separator, _documents_key(part, data)
            lines.append(
                f"{separator!r} stands in {abbreviate_names(texts)}: {key}=separator would cut the documents there"
            )
    return lines


def check_no_pointers(shards: Iterable[Shard], source: str) -> None:
    """Errors: UserError if files on this machine are pointers of git-lfs or git-annex to the files themselves."""
    small = [shard for shard in shards if shard.is_local and (shard.size or 0) < MAX_POINTER_BYTES]
    found = {shard.name: pointer for shard in small if (pointer := detect_pointer(_read_small_file(shard)))}
    if found:
        whose, get = next(iter(found.values()))
        are = "file of {!r} is a pointer" if len(found) == 1 else "files of {!r} are pointers"
        what = f"{len(found):,} {are.format(source)} of {whose}, not the data"
        raise UserError(
            Problem(
                what, abbreviate_names(found), f"the files: `{get}` in their folder", str(Path(small[0].place).parent)
            )
        )


def find_evaluation_splits(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split that a folder or the name says they are of; {} unless one is for evaluation and others not."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_guess_split(name), []).append(name)
    evaluation = {"test", "validation"} & set(found)
    return {split: found[split] for split in sorted(evaluation)} if evaluation and len(found) > 1 else {}


def find_files_with_separator(part: MixedSource, shards: Iterable[Shard]) -> list[str]:
    """The names of files that are to be one document each, and hold the text that parts documents elsewhere.

    Only the first files are looked into.
    """
    if part.documents != "file":
        return []
    whole = [shard for shard in shards if shard.is_local and format_suffix(shard.name) not in RECORD_SUFFIXES]
    separator = part.document_separator.encode()
    return [shard.name for shard in whole[:SEPARATOR_SEARCH_FILES] if separator in _read_text_head(shard)]


def check_enough_documents(listed: dict[str, SourceListing], data: DataSection, num_streams: int) -> None:
    """Errors: UserError for a source of whole files that are fewer than it needs documents to be streamed."""
    for part in data.parts:
        shards = listed[part.name].shards
        if part.documents != "file" or any(format_suffix(shard.name) in RECORD_SUFFIXES for shard in shards):
            continue
        needed = num_streams + (0 if has_own_validation(part) else 1)
        if len(shards) < needed:
            key = _documents_key(part, data)
            cut = f"{key}=separator" if find_files_with_separator(part, shards) else f"{key}=blank_lines or separator"
            what = f"the source {part.name!r} has fewer documents than streams"
            saw = f"{len(shards)}, as each file is one"
            want = (
                f"at least {needed}, one per stream and one held out" if needed > num_streams else f"at least {needed}"
            )
            raise UserError(Problem(what, saw, want, f"{cut}, or data.streams, or data.mode=cached"))


def _documents_key(part: MixedSource, data: DataSection) -> str:
    return f"data.sources.{part.name}.documents" if data.sources else "data.documents"


def _guess_split(name: str) -> str:
    """The split that a file is of; '' where nothing says so. A folder says it by its name, a file by a word in it."""
    *folders, file = PurePosixPath(name.lower()).parts
    stem = re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?$", "", file.removesuffix("".join(PurePosixPath(file).suffixes[-2:])))
    begin, *_, end = ["", *re.split(r"[-_. ]+", stem)][1:] * 2
    return next((split for split, names in SPLIT_WORDS.items() if {*folders, begin, end} & set(names)), "")


def _describe_splits(source: str, splits: dict[str, list[str]]) -> str:
    """A warning."""
    each = " and ".join(f"{len(names):,} of {split} ({abbreviate_names(names)})" for split, names in splits.items())
    return (
        f"warning: files of {source} seem to be for evaluation and are trained on like the others: {each};"
        " data.validation_path holds them out, data.pattern leaves them out"
    )


def _read_small_file(shard: Shard) -> bytes:
    """A small file. Errors: UserError if it cannot be read."""
    try:
        return Path(shard.url).read_bytes()
    except OSError as error:
        raise unreadable_file_error(error, shard.place) from None


def _read_text_head(shard: Shard) -> bytes:
    """The first bytes of what a file of text holds. Errors: UserError if it cannot be read."""
    try:
        with Path(shard.url).open("rb") as file:
            return read_head(shard, file, SEPARATOR_SEARCH_BYTES)
    except OSError as error:
        raise unreadable_file_error(error, shard.place) from None
