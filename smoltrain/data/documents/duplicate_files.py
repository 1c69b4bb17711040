"""Files that are listed twice: over a link, under two names, with and without their compression, by two sources.

A document that is read twice is trained on twice; worse, its two names may fall on different sides of the split. So
each file is read once, and none that is held out is trained on. What is left out is told, never silent.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from smoltrain.data.documents.file_kinds import abbreviate_names
from smoltrain.data.documents.shard import RECORD_SUFFIXES, Shard, format_suffix, strip_compression

FileKeys = tuple[str, ...]  # by any of which a file is known, whatever it is called


def file_keys(shards: Iterable[Shard]) -> list[FileKeys]:
    """The keys of each shard: two shards that share one are the same file, or one is the other compressed."""
    folders: dict[Path, str] = {}  # to their real places
    found = []
    for shard in shards:
        if not shard.is_local:
            found.append((strip_compression(shard.url.partition("#")[0]),))
            continue
        path = Path(shard.url)
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        about = path.stat()
        place = f"{folders[path.parent]}/{strip_compression(path.name)}"
        found.append((place, f"inode {about.st_dev} {about.st_ino}"))
    return found


def remove_duplicate_files(shards: Sequence[Shard]) -> tuple[list[Shard], list[str]]:
    """Each file once, in the order given; and in words what is left out, and why.

    What is no link, and not empty, goes before what is; then what is not compressed; then the first name.
    """
    owners: dict[str, Shard] = {}
    left: dict[str, Shard] = {}
    for shard, known in sorted(
        zip(shards, file_keys(shards), strict=True), key=lambda pair: _preference_order(pair[0])
    ):
        same = next((owners[key] for key in known if key in owners), None)
        if same is not None:
            left[shard.url] = same
        for key in known:
            owners.setdefault(key, same or shard)
    words = [f"{shard.name} (is {left[shard.url].name})" for shard in shards if shard.url in left]
    return [shard for shard in shards if shard.url not in left], words


def partition_shards(
    shards: Sequence[Shard], others: set[str], text_field: str = ""
) -> tuple[list[Shard], list[Shard]]:
    """(those that are none of the others, those that are), by the keys as `reading` gives them."""
    apart, shared = [], []
    for shard, known in zip(shards, text_keys(shards, text_field), strict=True):
        (shared if any(key in others for key in known) else apart).append(shard)
    return apart, shared


def text_keys(shards: Sequence[Shard], text_field: str = "") -> list[FileKeys]:
    """The keys of the texts in each shard: another field of the same records is another text."""
    of = [f" {text_field}" if text_field and format_suffix(shard.name) in RECORD_SUFFIXES else "" for shard in shards]
    return [tuple(f"{key}{field}" for key in known) for known, field in zip(file_keys(shards), of, strict=True)]


def describe_left_out_files(source: str, shards: Sequence[Shard], why: str) -> str:
    """A line about files that are left out."""
    are = "file of {} is" if len(shards) == 1 else "files of {} are"
    return f"{len(shards):,} {are.format(source)} {why}: {abbreviate_names(shard.name for shard in shards)}"


def _preference_order(shard: Shard) -> tuple[bool, bool, int, str]:
    link = shard.is_local and Path(shard.url).is_symlink()
    return (
        link,
        shard.size == 0,
        (".zst", ".gz").index(_compression_suffix(shard)) + 1 if _compression_suffix(shard) else 0,
        shard.name,
    )


def _compression_suffix(shard: Shard) -> str:
    """The compression of a readable file; '' for none."""
    return shard.name[len(strip_compression(shard.name)) :].lower()
