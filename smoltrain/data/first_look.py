"""What names, sizes and first bytes tell about the files of a new run, before anything slow is done with them."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from smoltrain.data import look_alikes, readers, sources
from smoltrain.data.fingerprints import Listing, holds_out_by_itself
from smoltrain.data.kinds import RECORDS, few, suffix_of
from smoltrain.data.sources import Shard
from smoltrain.errors import Problem, UserError
from smoltrain.schema import DataSection, MixedSource

HEAD_BYTES = 2**20  # of a whole file, in which its separator is looked for
NUM_HEADS = 20  # files that are looked into
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}


def look(listed: dict[str, Listing], data: DataSection) -> list[str]:
    """Lines to be said about the files. Errors: UserError where pointers lie in place of files."""
    lines = []
    for part in data.parts:
        listing = listed[part.name]
        check_pointers(listing.all, part.name)
        lines += listing.left_out
        if splits := splits_of(shard.name for shard in listing.shards):
            lines.append(_splits_in_words(part.name, splits))
        if texts := separated(part, listing.all):
            separator, key = part.document_separator, _documents_key(part, data)
            lines.append(f"{separator!r} stands in {few(texts)}: {key}=separator would cut the documents there")
    return lines


def check_pointers(shards: Iterable[Shard], source: str) -> None:
    """Errors: UserError if files on this machine are pointers of git-lfs or git-annex to the files themselves."""
    small = [shard for shard in shards if shard.is_local and (shard.size or 0) < look_alikes.POINTER_BYTES]
    found = {shard.name: pointer for shard in small if (pointer := look_alikes.pointer_in(_bytes(shard)))}
    if found:
        whose, get = next(iter(found.values()))
        are = "file of {!r} is a pointer" if len(found) == 1 else "files of {!r} are pointers"
        what = f"{len(found):,} {are.format(source)} of {whose}, not the data"
        raise UserError(
            Problem(what, few(found), f"the files: `{get}` in their folder", str(Path(small[0].place).parent))
        )


def splits_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split that a folder or the name says they are of; {} unless one is for evaluation and others not."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_split(name), []).append(name)
    evaluation = {"test", "validation"} & set(found)
    return {split: found[split] for split in sorted(evaluation)} if evaluation and len(found) > 1 else {}


def separated(part: MixedSource, shards: Iterable[Shard]) -> list[str]:
    """The names of files that are to be one document each, and hold the text that parts documents elsewhere.

    Only the first files are looked into.
    """
    if part.documents != "file":
        return []
    whole = [shard for shard in shards if shard.is_local and suffix_of(shard.name) not in RECORDS]
    separator = part.document_separator.encode()
    return [shard.name for shard in whole[:NUM_HEADS] if separator in _text(shard)]


def check_streams(listed: dict[str, Listing], data: DataSection, num_streams: int) -> None:
    """Errors: UserError for a source of whole files that are fewer than it needs documents to be streamed."""
    for part in data.parts:
        shards = listed[part.name].shards
        if part.documents != "file" or any(suffix_of(shard.name) in RECORDS for shard in shards):
            continue
        needed = num_streams + (0 if holds_out_by_itself(part) else 1)
        if len(shards) < needed:
            key = _documents_key(part, data)
            cut = f"{key}=separator" if separated(part, shards) else f"{key}=blank_lines or separator"
            what = f"the source {part.name!r} has fewer documents than streams"
            saw = f"{len(shards)}, as each file is one"
            want = (
                f"at least {needed}, one per stream and one held out" if needed > num_streams else f"at least {needed}"
            )
            raise UserError(Problem(what, saw, want, f"{cut}, or data.streams, or data.mode=cached"))


def _documents_key(part: MixedSource, data: DataSection) -> str:
    return f"data.sources.{part.name}.documents" if data.sources else "data.documents"


def _split(name: str) -> str:
    """The split that a file is of; '' where nothing says so. A folder says it by its name, a file by a word in it."""
    *folders, file = PurePosixPath(name.lower()).parts
    stem = re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?$", "", file.removesuffix("".join(PurePosixPath(file).suffixes[-2:])))
    begin, *_, end = ["", *re.split(r"[-_. ]+", stem)][1:] * 2
    return next((split for split, names in SPLITS.items() if {*folders, begin, end} & set(names)), "")


def _splits_in_words(source: str, splits: dict[str, list[str]]) -> str:
    """A warning."""
    each = " and ".join(f"{len(names):,} of {split} ({few(names)})" for split, names in splits.items())
    return (
        f"warning: files of {source} seem to be for evaluation and are trained on like the others: {each};"
        " data.validation_path holds them out, data.pattern leaves them out"
    )


def _bytes(shard: Shard) -> bytes:
    """A small file. Errors: UserError if it cannot be read."""
    try:
        return Path(shard.url).read_bytes()
    except OSError as error:
        raise sources.unreadable(error, shard.place) from None


def _text(shard: Shard) -> bytes:
    """The first bytes of what a file of text holds. Errors: UserError if it cannot be read."""
    try:
        with Path(shard.url).open("rb") as file:
            return readers.head(shard, file, HEAD_BYTES)
    except OSError as error:
        raise sources.unreadable(error, shard.place) from None
