"""The files of each source of a config: each file is read once, and none that is held out is trained on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from smoltrain.config.schema import Config, DataSection, MixedSource
from smoltrain.data.documents.duplicate_files import (
    describe_left_out_files,
    file_keys,
    partition_shards,
    remove_duplicate_files,
    text_keys,
)
from smoltrain.data.documents.find_files import find_source_files
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import Problem, UserError, abbreviate_list


@dataclass(frozen=True)
class SourceListing:
    """The files of one source as they stand; held_out are those of its own validation side, if it has one."""

    shards: tuple[Shard, ...]
    held_out: tuple[Shard, ...] = ()
    unread: dict[str, int] = field(default_factory=dict)  # counts of the files that are not read, by kind in words
    exclusion_notes: tuple[str, ...] = ()  # lines about files that would be read twice, or on both sides

    @property
    def all_shards(self) -> tuple[Shard, ...]:
        """Of either side."""
        return (*self.shards, *self.held_out)


def list_all_sources(config: Config) -> dict[str, SourceListing]:
    """The files of each source by its name. Errors: those of `find_source_files` and `exclude_shared_files`."""
    listed = {part.name: list_one_source(part, config.data) for part in config.data.parts}
    return exclude_shared_files(listed, config.data)


def list_one_source(part: MixedSource, data: DataSection, commit: str | None = None) -> SourceListing:
    """The files of one source by itself; those of a Hub dataset at that commit, of which None is the newest.

    Errors: those of `find_source_files`.
    """
    key = source_config_key(part.name, data)
    train = find_source_files(part, key=key, commit=commit)
    commit = hub_commit(train.shards) if part.hub else None
    validation = find_source_files(part, key=key, commit=commit, held_out=True)
    shards, left_out = remove_duplicate_files(train.shards)
    held_out, held_out_twice = remove_duplicate_files(validation.shards)
    notes: tuple[str, ...] = ()
    if left_out or held_out_twice:
        notes = (f"the same file of {part.name} is read once: {abbreviate_list(left_out + held_out_twice)}",)
    unread = dict(Counter(train.unread) + Counter(validation.unread))
    return SourceListing(tuple(shards), tuple(held_out), unread, notes)


def exclude_shared_files(listed: dict[str, SourceListing], data: DataSection) -> dict[str, SourceListing]:
    """The same files, but none that any source holds out is trained on, and none is trained on by two sources.

    Errors: UserError if a source has no file left to train on.
    """
    held_out = {key for listing in listed.values() for keys in file_keys(listing.held_out) for key in keys}
    taken: set[str] = set()  # by the sources before
    result: dict[str, SourceListing] = {}
    for part in data.parts:
        if part.name not in listed:
            continue
        listing = listed[part.name]
        notes = list(listing.exclusion_notes)
        shards, shared = partition_shards(listing.shards, held_out)
        if shared:
            notes.append(describe_left_out_files(part.name, shared, "held out, so not trained on"))
        shards, shared = partition_shards(shards, taken, part.text_field)
        if shared:
            notes.append(describe_left_out_files(part.name, shared, "read for a source named before it"))
        if not shards:
            what, want = f"the source {part.name!r} has no file to train on", "at least one that is no other's"
            change = f"{source_config_key(part.name, data)}.path or validation_path"
            raise UserError(Problem(what, "; ".join(notes), want, change))
        taken |= {key for keys in text_keys(shards, part.text_field) for key in keys}
        result[part.name] = replace(listing, shards=tuple(shards), exclusion_notes=tuple(notes))
    return result


def source_config_key(name: str, data: DataSection) -> str:
    """The section of the config that a mistake in a source is blamed on."""
    return f"data.sources.{name}" if data.sources else "data"


def has_own_validation(part: MixedSource) -> bool:
    """Whether a source has a validation side of its own, so that validation_share is not for it."""
    return part.validation_path is not None or part.validation_split is not None


def hub_commit(shards: Sequence[Shard]) -> str:
    """The commit at which the files of a Hub dataset were listed."""
    return shards[0].version.removeprefix("commit ")
