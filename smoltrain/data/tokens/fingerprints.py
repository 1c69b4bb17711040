"""What the tokens of a run are a function of, as JSON; made at the first `prepare`, compared at every later one."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smoltrain.config.schema import Config, DataSection, MixedSource
from smoltrain.data.documents import listing as listing_module
from smoltrain.data.documents.duplicate_files import (
    describe_left_out_files,
    file_keys,
    partition_shards,
    remove_duplicate_files,
    text_keys,
)
from smoltrain.data.documents.file_kinds import abbreviate_names
from smoltrain.data.documents.shard import Shard, hash_shard
from smoltrain.data.tokenizers import by_name as by_name_module
from smoltrain.data.tokenizers.by_name import is_tokenizer_folder
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError


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
    """The files of each source by its name. Errors: those of `sources.shards`; those of `apart`."""
    return exclude_shared_files(
        {part.name: list_one_source(part, config.data) for part in config.data.parts}, config.data
    )


def list_one_source(part: MixedSource, data: DataSection) -> SourceListing:
    """The files of one source by itself. Errors: those of `sources.shards`."""
    key = _config_key(part, data)
    train = listing_module.find_source_files(part, key=key)
    commit = _hub_commit(tuple(train.shards)) if part.hub else None
    held = listing_module.find_source_files(part, key=key, commit=commit, held_out=True)
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


def make_fingerprint(
    config: Config, given: Tokenizer | None, mode: str, listed: dict[str, SourceListing]
) -> dict[str, Any]:
    """The fingerprint. `given` is any tokenizer but one to be trained, which is itself a function of the sources.

    In cached mode every local file is read once, about 1 GB/s. Errors: UserError if one cannot be read.
    """
    name, section = config.tokenizer.name, config.tokenizer
    tokenizer = {"name": name, "sha256": given.fingerprint()} if given else {"bpe": section.vocab_size}
    about = {part.name: _fingerprint_source(part, config.data, mode, listed[part.name]) for part in config.data.parts}
    return {"sources": about, "tokenizer": tokenizer, "separator": section.separator, "pad": section.pad}


def remake_fingerprint(
    config: Config, made: dict[str, Any], mode: str
) -> tuple[dict[str, Any], dict[str, SourceListing]]:
    """The fingerprint as far as it can be had without the Hub, tiktoken or a package; the rest is as it was made.

    A local folder counts by what is in it, not by its name. Also returns the files of those sources that were listed.
    Errors: those of `sources.shards`, but not for a server that a cached run no longer needs.
    """
    section, was = config.tokenizer, made["tokenizer"]
    if section.name == "bpe":
        tokenizer = {"bpe": section.vocab_size}
    elif is_tokenizer_folder(section.name):
        tokenizer = {"name": was.get("name"), "sha256": by_name_module.load_named_tokenizer(section).fingerprint()}
    else:
        tokenizer = {"name": section.name, "sha256": was.get("sha256")}
    about: dict[str, Any] = {}
    listed: dict[str, SourceListing] = {}
    for part in config.data.parts:
        before = made["sources"].get(part.name, {})
        if part.hub and not part.validation_path:
            about[part.name] = _source_settings(part, config.data) | _fingerprint_hub(part, before.get("commit"))
            continue
        try:
            listed[part.name] = list_one_source(part, config.data)
        except UserError as error:
            if mode == "stream" or "://" not in f"{part.path}{part.validation_path}":
                raise
            print(f"data: {error}; the tokens that were made of it stay in use", flush=True)
            about[part.name] = before
    listed = exclude_shared_files(listed, config.data)
    by_name = {part.name: part for part in config.data.parts}
    about |= {name: _fingerprint_source(by_name[name], config.data, mode, found) for name, found in listed.items()}
    return {"sources": about, "tokenizer": tokenizer, "separator": section.separator, "pad": section.pad}, listed


def fingerprint_differences(made: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not as it was: path in the fingerprint -> (before, now)."""
    before, after = dict(_flatten(made)), dict(_flatten(now))
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in changed}


def only_documents_changed(changed: dict[str, tuple[Any, Any]]) -> bool:
    """Whether it is only documents that changed, so that data.allow_changed can accept it."""
    return all(key.startswith("sources/") and not key.endswith("/validation_share") for key in changed)


def describe_fingerprint_changes(changed: dict[str, tuple[Any, Any]]) -> tuple[str, str]:
    """What is seen and what was wanted: the first three differences, and how many more there are."""
    was, saw = (
        ", ".join([f"{key} = {_format_value(pair[i])}" for key, pair in list(changed.items())[:3]]) for i in range(2)
    )
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return saw + more, was + more


def changed_data_error(changed: dict[str, tuple[Any, Any]], config: Config, folder: Path) -> UserError:
    """What in the config, or in the files that it names, is not what `folder` was made of."""
    saw, want = describe_fingerprint_changes(changed)
    change = f"run.name to prepare them for a new run; {folder} is left as it is"
    if only_documents_changed(changed):
        change += "; data.allow_changed=true goes on with the data as they are now"
    return UserError(Problem(f"the run {config.run.name!r} was prepared from other data", saw, want, change))


def _fingerprint_source(part: MixedSource, data: DataSection, mode: str, listed: SourceListing) -> dict[str, Any]:
    about = _source_settings(part, data)
    if part.hub:
        about |= _fingerprint_hub(part, _hub_commit(listed.shards))
    else:
        about["files"] = _fingerprint_files(listed.shards, mode)
    if part.validation_path:
        about["validation_files"] = _fingerprint_files(listed.held_out, mode)
    return about


def _source_settings(part: MixedSource, data: DataSection) -> dict[str, Any]:
    """The part that stands in the config itself."""
    about = {"text_field": part.text_field, "documents": part.documents, "max_document_mib": data.max_document_mib}
    if part.documents == "separator":
        about["document_separator"] = part.document_separator
    if not has_own_validation(part):
        about["validation_share"] = data.validation_share
    return about


def _fingerprint_hub(part: MixedSource, commit: str | None) -> dict[str, Any]:
    about = {"hub": part.hub, "config": part.hub_config, "split": part.hub_split, "commit": commit}
    return about | ({"validation_split": part.validation_split} if part.validation_split else {})


def _hub_commit(shards: tuple[Shard, ...]) -> str:
    return shards[0].version.removeprefix("commit ")


def _fingerprint_files(shards: tuple[Shard, ...], mode: str) -> dict[str, Any]:
    """Each file's size (bytes) and, where all of it is read anyway, its SHA-256; elsewhere its version."""
    return {
        shard.name: {"bytes": shard.size}
        | ({"sha256": hash_shard(shard)} if mode == "cached" and shard.is_local else {"version": shard.version})
        for shard in shards
    }


def _flatten(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every path in a fingerprint and what stands there; a file is one such thing."""
    for key, value in tree.items():
        if isinstance(value, dict) and "bytes" not in value:
            yield from _flatten(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _format_value(value: object) -> str:
    match value:
        case None:
            return "none"
        case {"bytes": int(size), "sha256": str(sha256)}:
            return f"{size:,} bytes ({sha256[:8]})"
        case {"bytes": int(size), "version": version}:
            return f"{size:,} bytes ({version})"
    return str(value)
