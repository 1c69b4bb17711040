"""What the tokens of a run are a function of, as JSON; made at the first start, compared at every later one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoltrain.config.schema import Config, DataSection, MixedSource, TokenizerSection
from smoltrain.data.documents.listing import (
    SourceListing,
    exclude_shared_files,
    has_own_validation,
    hub_commit,
    list_one_source,
)
from smoltrain.data.documents.shard import Shard, hash_shard
from smoltrain.data.tokenizers import by_name
from smoltrain.data.tokenizers.by_name import is_tokenizer_folder
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError


def make_fingerprint(
    config: Config, given: Tokenizer | None, mode: str, listed: dict[str, SourceListing]
) -> dict[str, Any]:
    """The fingerprint. `given` is any tokenizer but one to be trained, which is itself a function of the sources.

    In cached mode every local file is read once, about 1 GB/s. Errors: UserError if one cannot be read.
    """
    section = config.tokenizer
    tokenizer = {"name": section.name, "sha256": given.fingerprint()} if given else {"bpe": section.vocab_size}
    sources = {part.name: _fingerprint_source(part, config.data, mode, listed[part.name]) for part in config.data.parts}
    return {"sources": sources, "tokenizer": tokenizer, "separator": section.separator, "pad": section.pad}


def remake_fingerprint(
    config: Config, made: dict[str, Any], mode: str
) -> tuple[dict[str, Any], dict[str, SourceListing]]:
    """The fingerprint as far as it can be had without the Hub, tiktoken or a package; the rest is as it was made.

    A local folder counts by what is in it, not by its name. Also returns the files of those sources that were listed.
    Errors: those of `list_one_source`, but not for a server that a cached run no longer needs.
    """
    section = config.tokenizer
    sources: dict[str, Any] = {}
    listed: dict[str, SourceListing] = {}
    for part in config.data.parts:
        before = made["sources"].get(part.name, {})
        if part.hub and not part.validation_path:
            sources[part.name] = _source_settings(part, config.data) | _fingerprint_hub(part, before.get("commit"))
            continue
        try:
            # Files beside a Hub dataset are looked at again; the dataset stays at the commit of the first start.
            commit = before.get("commit") if part.hub == before.get("hub") else None
            listed[part.name] = list_one_source(part, config.data, commit)
        except UserError as error:
            is_remote = part.hub is not None or "://" in f"{part.path}{part.validation_path}"
            if mode == "stream" or not is_remote:
                raise
            print(f"data: {error}; the tokens that were made of it stay in use", flush=True)
            sources[part.name] = before
    listed = exclude_shared_files(listed, config.data)
    for part in config.data.parts:
        if part.name in listed:
            sources[part.name] = _fingerprint_source(part, config.data, mode, listed[part.name])
    tokenizer = _refingerprint_tokenizer(section, made["tokenizer"])
    return {"sources": sources, "tokenizer": tokenizer, "separator": section.separator, "pad": section.pad}, listed


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
    shown = list(changed.items())[:3]
    saw = ", ".join(f"{key} = {_format_value(now)}" for key, (_, now) in shown)
    want = ", ".join(f"{key} = {_format_value(before)}" for key, (before, _) in shown)
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return saw + more, want + more


def changed_data_error(changed: dict[str, tuple[Any, Any]], config: Config, folder: Path) -> UserError:
    """What in the config, or in the files that it names, is not what `folder` was made of."""
    saw, want = describe_fingerprint_changes(changed)
    change = f"run.name to prepare them for a new run; {folder} is left as it is"
    if only_documents_changed(changed):
        change += "; data.allow_changed=true goes on with the data as they are now"
    return UserError(Problem(f"the run {config.run.name!r} was prepared from other data", saw, want, change))


def _refingerprint_tokenizer(section: TokenizerSection, before: dict[str, Any]) -> dict[str, Any]:
    """Of a tokenizer that would have to be fetched, the digest that it had before."""
    if section.name == "bpe":
        return {"bpe": section.vocab_size}
    if is_tokenizer_folder(section.name):
        return {"name": before.get("name"), "sha256": by_name.load_named_tokenizer(section).fingerprint()}
    return {"name": section.name, "sha256": before.get("sha256")}


def _fingerprint_source(part: MixedSource, data: DataSection, mode: str, listed: SourceListing) -> dict[str, Any]:
    fingerprint = _source_settings(part, data)
    if part.hub:
        fingerprint |= _fingerprint_hub(part, hub_commit(listed.shards))
    else:
        fingerprint["files"] = _fingerprint_files(listed.shards, mode)
    if part.validation_path:
        fingerprint["validation_files"] = _fingerprint_files(listed.held_out, mode)
    return fingerprint


def _source_settings(part: MixedSource, data: DataSection) -> dict[str, Any]:
    """The part that stands in the config itself."""
    settings = {"text_field": part.text_field, "documents": part.documents, "max_document_mib": data.max_document_mib}
    if part.documents == "separator":
        settings["document_separator"] = part.document_separator
    if not has_own_validation(part):
        settings["validation_share"] = data.validation_share
    return settings


def _fingerprint_hub(part: MixedSource, commit: str | None) -> dict[str, Any]:
    dataset = {"hub": part.hub, "config": part.hub_config, "split": part.hub_split, "commit": commit}
    return dataset | ({"validation_split": part.validation_split} if part.validation_split else {})


def _fingerprint_files(shards: tuple[Shard, ...], mode: str) -> dict[str, Any]:
    """Each file's size (bytes) and, where all of it is read anyway, its SHA-256; elsewhere its version."""
    fingerprints = {}
    for shard in shards:
        is_read = mode == "cached" and shard.is_local
        content = {"sha256": hash_shard(shard)} if is_read else {"version": shard.version}
        fingerprints[shard.name] = {"bytes": shard.size} | content
    return fingerprints


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
