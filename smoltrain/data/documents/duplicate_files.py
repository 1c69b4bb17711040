"""Files that are listed twice: over a link, under two names, with and without their compression, by two sources.

A document that is read twice is trained on twice; worse, its two names may fall on different sides of the split. So
each file is read once, and none that is held out is trained on. What is left out is told, never silent.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from smoltrain.data.documents.decompress import COMPRESSIONS
from smoltrain.data.documents.readers import has_fields, strip_compression
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import abbreviate_list

FileKeys = tuple[str, ...]  # by any of which a file is known, whatever it is called


def file_keys(shards: Iterable[Shard]) -> list[FileKeys]:
    """The keys of each shard: two shards that share one are the same file, or one is the other compressed.

    Of a local file they are its real path without its compression's suffix, and its inode; of a remote one its URL.
    """
    real_folders: dict[Path, str] = {}
    keys: list[FileKeys] = []
    for shard in shards:
        if not shard.is_local:
            keys.append((strip_compression(shard.url.partition("#")[0]),))
            continue
        path = Path(shard.url)
        if path.parent not in real_folders:
            real_folders[path.parent] = os.path.realpath(path.parent)
        stat = path.stat()
        place = f"{real_folders[path.parent]}/{strip_compression(path.name)}"
        keys.append((place, f"inode {stat.st_dev} {stat.st_ino}"))
    return keys


def text_keys(shards: Sequence[Shard], text_field: str = "") -> list[FileKeys]:
    """The keys of the texts in each shard: another field of the same records is another text."""
    keys: list[FileKeys] = []
    for shard, of_file in zip(shards, file_keys(shards), strict=True):
        field = f" {text_field}" if text_field and has_fields(shard.name) else ""
        keys.append(tuple(f"{key}{field}" for key in of_file))
    return keys


def remove_duplicate_files(shards: Sequence[Shard]) -> tuple[list[Shard], list[str]]:
    """Each file once, in the order given; and in words what is left out, and why."""
    keys = dict(zip([shard.url for shard in shards], file_keys(shards), strict=True))
    owners: dict[str, Shard] = {}  # of each key: the shard that is read
    same_as: dict[str, Shard] = {}  # url of a shard that is left out -> the one that is read for it
    for shard in sorted(shards, key=_preference_order):
        known = [owners[key] for key in keys[shard.url] if key in owners]
        if known:
            same_as[shard.url] = known[0]
        for key in keys[shard.url]:
            owners.setdefault(key, known[0] if known else shard)
    kept = [shard for shard in shards if shard.url not in same_as]
    words = [f"{shard.name} (is {same_as[shard.url].name})" for shard in shards if shard.url in same_as]
    return kept, words


def _preference_order(shard: Shard) -> tuple[bool, bool, int, str]:
    """Sorts what is no link, and not empty, first; then what is not compressed, then .zst; then the first name."""
    is_link = shard.is_local and Path(shard.url).is_symlink()
    is_compressed = strip_compression(shard.name) != shard.name
    suffix = PurePosixPath(shard.name).suffix.lower()
    rank = 1 + COMPRESSIONS.index(suffix) if is_compressed else 0
    return is_link, shard.size == 0, rank, shard.name


def partition_shards(shards: Sequence[Shard], taken: set[str], text_field: str = "") -> tuple[list[Shard], list[Shard]]:
    """(the shards none of whose `text_keys` is taken, the others)."""
    free: list[Shard] = []
    shared: list[Shard] = []
    for shard, keys in zip(shards, text_keys(shards, text_field), strict=True):
        (free if taken.isdisjoint(keys) else shared).append(shard)
    return free, shared


def describe_left_out_files(source: str, shards: Sequence[Shard], why: str) -> str:
    """A line about files that are left out."""
    are = f"file of {source} is" if len(shards) == 1 else f"files of {source} are"
    return f"{len(shards):,} {are} {why}: {abbreviate_list([shard.name for shard in shards])}"
