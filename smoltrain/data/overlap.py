"""Files that are listed twice: over a link, under two names, with and without their compression, by two sources.

A document that is read twice is trained on twice; worse, its two names may fall on different sides of the split. So
each file is read once, and none that is held out is trained on. What is left out is told, never silent.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from smoltrain.data.kinds import RECORDS, few, suffix_of, uncompressed
from smoltrain.data.sources import Shard

Keys = tuple[str, ...]  # by any of which a file is known, whatever it is called


def keys(shards: Iterable[Shard]) -> list[Keys]:
    """The keys of each shard: two shards that share one are the same file, or one is the other compressed."""
    folders: dict[Path, str] = {}  # to their real places
    found = []
    for shard in shards:
        if not shard.is_local:
            found.append((uncompressed(shard.url.partition("#")[0]),))
            continue
        path = Path(shard.url)
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        about = path.stat()
        place = f"{folders[path.parent]}/{uncompressed(path.name)}"
        found.append((place, f"inode {about.st_dev} {about.st_ino}"))
    return found


def unique(shards: Sequence[Shard]) -> tuple[list[Shard], list[str]]:
    """Each file once, in the order given; and in words what is left out, and why.

    What is no link, and not empty, goes before what is; then what is not compressed; then the first name.
    """
    owners: dict[str, Shard] = {}
    left: dict[str, Shard] = {}
    for shard, known in sorted(zip(shards, keys(shards), strict=True), key=lambda pair: _rank(pair[0])):
        same = next((owners[key] for key in known if key in owners), None)
        if same is not None:
            left[shard.url] = same
        for key in known:
            owners.setdefault(key, same or shard)
    words = [f"{shard.name} (is {left[shard.url].name})" for shard in shards if shard.url in left]
    return [shard for shard in shards if shard.url not in left], words


def without(shards: Sequence[Shard], others: set[str], text_field: str = "") -> tuple[list[Shard], list[Shard]]:
    """(those that are none of the others, those that are), by the keys as `reading` gives them."""
    apart, shared = [], []
    for shard, known in zip(shards, reading(shards, text_field), strict=True):
        (shared if any(key in others for key in known) else apart).append(shard)
    return apart, shared


def reading(shards: Sequence[Shard], text_field: str = "") -> list[Keys]:
    """The keys of the texts in each shard: another field of the same records is another text."""
    of = [f" {text_field}" if text_field and suffix_of(shard.name) in RECORDS else "" for shard in shards]
    return [tuple(f"{key}{field}" for key in known) for known, field in zip(keys(shards), of, strict=True)]


def files_of(source: str, shards: Sequence[Shard], why: str) -> str:
    """A line about files that are left out."""
    are = "file of {} is" if len(shards) == 1 else "files of {} are"
    return f"{len(shards):,} {are.format(source)} {why}: {few(shard.name for shard in shards)}"


def _rank(shard: Shard) -> tuple[bool, bool, int, str]:
    link = shard.is_local and Path(shard.url).is_symlink()
    return link, shard.size == 0, (".zst", ".gz").index(_last(shard)) + 1 if _last(shard) else 0, shard.name


def _last(shard: Shard) -> str:
    """The compression of a readable file; '' for none."""
    return shard.name[len(uncompressed(shard.name)) :].lower()
