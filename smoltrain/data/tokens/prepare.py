"""What is made once, before the first step: RUN/tokenizer/ and RUN/data/index.json with the tokens that it names.

In cached mode these are all tokens (cached.py), in RUN/data or in a folder that runs share; in stream mode those of the
validation side (validation.py). index.json says what they were made from. It is written last, so that it exists only
beside whole files: a killed `prepare` goes on with what is whole, and makes anew what is not.
"""

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from smoltrain import files
from smoltrain.config.schema import Config
from smoltrain.data.documents.bad_records import summarise_bad_records, write_bad_record_log
from smoltrain.data.documents.check_files import check_enough_documents, check_source_files
from smoltrain.data.documents.listing import SourceListing, list_all_sources
from smoltrain.data.order import apportion_by_weight, largest_num_streams
from smoltrain.data.tokenizers import by_name
from smoltrain.data.tokenizers.by_name import is_tokenizer_folder
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokenizers.train_bpe import check_bpe_separator, train_bpe_tokenizer
from smoltrain.data.tokens import tokenise
from smoltrain.data.tokens.check_tokens import (
    find_damaged_files,
    find_damaged_tokenizer_files,
    recorded_token_files,
    repair_tokenizer,
    repair_tokens,
)
from smoltrain.data.tokens.fingerprints import (
    changed_data_error,
    describe_fingerprint_changes,
    fingerprint_differences,
    make_fingerprint,
    only_documents_changed,
    remake_fingerprint,
)
from smoltrain.data.tokens.index import INDEX_FORMAT, data_index_file, read_data_index, write_data_index
from smoltrain.data.tokens.packing import count_rows
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.token_files import SIDES, MappedTokens
from smoltrain.data.tokens.tokenise import token_dtype
from smoltrain.data.tokens.tokenise_validation import shards_from_json, shards_to_json, tokenise_held_out
from smoltrain.errors import Problem, UserError, format_value

MAX_AUTO_CACHED_MIB = 256  # of local files, up to which they are cached of themselves


def prepare_run_data(
    config: Config, rows_per_step: int | None = None, world_size: int = 1, *, ahead: bool = False
) -> PreparedData:
    """Make the run's tokens, or find them made. One process calls this; the others `load` afterwards.

    rows_per_step is over all ranks; None is what batch says for one rank. The first call chooses the mode (`ahead` of
    a run always cached, unless data.mode says stream) and the number of streams, gets or trains the tokenizer, and
    tokenises. Later calls compare fingerprints (a local file that is cached is hashed again) and sizes, and write
    nothing.

    Errors: UserError for bad documents or tokenizers, ids that the model has no room for, too few tokens for a step or
    for validation, streams that do not fit, and data other than those already prepared. Nothing that was complete is
    ever overwritten.
    """
    batch = config.batch
    rows_per_step = rows_per_step or batch.rows(1)
    if data_index_file(config.run_folder).exists():
        index = read_run_index(config)
        listed = _compare_fingerprints(config, index)
        _repair_run_data(config, index, listed)
        prepared = load_prepared_data(config)
        if prepared.mode == "stream":
            _check_stream_count(config, prepared.streams, rows_per_step, world_size)
        check_enough_rows(prepared.index, config, rows_per_step)
        return prepared
    section = config.tokenizer
    check_bpe_separator(section)
    given = None if section.name == "bpe" else by_name.load_named_tokenizer(section)
    num_ids = given.num_ids if given else (section.vocab_size or 0) + (section.pad is not None)
    _check_vocab_size(num_ids, config)  # a BPE: before training it
    listed = list_all_sources(config)
    for line in check_source_files(listed, config.data):
        print(f"data: {line}", flush=True)
    mode, why = _choose_mode(config, listed)
    if ahead and config.data.mode == "auto" and mode == "stream":
        mode, why = "cached", "it was prepared ahead"
    fingerprint = make_fingerprint(config, given, mode, listed)
    others = dict(sum((Counter(listing.unread) for listing in listed.values()), Counter[str]()))
    index = {"format": INDEX_FORMAT, "mode": mode, "why": why, "fingerprint": fingerprint, "not_read": others}
    if mode == "stream":
        _prepare_stream(config, given, listed, index, rows_per_step, world_size)
    elif config.data.cache is None:
        _prepare_cached(config, given, listed, index, rows_per_step, config.run_folder)
    else:
        _prepare_shared(config, given, listed, index, rows_per_step)
    prepared = load_prepared_data(config)
    for line in prepared.warnings(config.model.vocab_size):
        print(f"WARNING: {line}", flush=True)
    return prepared


def load_prepared_data(config: Config) -> PreparedData:
    """What `prepare` made. Errors: UserError if there is nothing, or if files were changed since."""
    index = read_run_index(config)
    tokenizer = _load_run_tokenizer(config, config.run_folder / "tokenizer", index)
    home, sources = run_tokens_folder(config, index), index["sources"].items()
    train, held = (
        tuple(MappedTokens.open(home / name, about[side]) for name, about in sources if side in about) for side in SIDES
    )
    parts = config.data.parts if index["mode"] == "stream" else ()
    shards = tuple(shards_from_json(index["sources"][part.name]["shards"], part) for part in parts)
    return PreparedData(
        tokenizer, config.tokenizer.name, index["mode"], index["why"], np.dtype(index["dtype"]), train, held, shards,
        index["streams"], index,
    )  # fmt: skip


def read_run_index(config: Config) -> dict[str, Any]:
    """The run's index, its sources in the config's order. Errors: those of index.read; UserError for other sources."""
    index = read_data_index(data_index_file(config.run_folder))
    names = [part.name for part in config.data.parts]
    if set(names) != set(index["sources"]):
        what, want = f"the run {config.run.name!r} was prepared from other sources", ", ".join(index["sources"])
        raise UserError(Problem(what, ", ".join(names), want, "data.sources, or run.name"))
    return index | {"sources": {name: index["sources"][name] for name in names}}


def run_tokens_folder(config: Config, index: dict[str, Any]) -> Path:
    """Where the tokens of a run are. Errors: UserError if they are in a cache that the config does not name."""
    if "cache" not in index:
        return config.run_folder / "data"
    if config.data.cache is None:
        want = f"the folder that holds {index['cache']}"
        raise UserError(Problem("the tokens of the run are in a cache", "data.cache=null", want, "data.cache"))
    cache = config.data.cache.expanduser()
    return files.resolve_inside(cache, index["cache"], str(data_index_file(config.run_folder))) / "data"


def check_tokenizer_fits(config: Config) -> None:
    """Errors: UserError for a tokenizer whose ids the model has no room for, if it lies in a folder of this machine."""
    section = config.tokenizer
    if section.name != "bpe" and is_tokenizer_folder(section.name):
        _check_vocab_size(by_name.load_named_tokenizer(section).num_ids, config)


def inspect_prepared_data(config: Config) -> tuple[str, list[str]]:
    """What was looked at of a run's tokens and tokenizer, in words, and what is wrong with them; nothing is mended.

    Errors: UserError if there are none, or another data.cache than theirs.
    """
    index = read_run_index(config)
    home, records = run_tokens_folder(config, index), recorded_token_files(index)
    faults = [f"{name}: {wrong}" for name, wrong in find_damaged_files(home, records).items()]
    folder = config.run_folder / "tokenizer"
    faults += [f"{name}: {wrong}" for name, wrong in find_damaged_tokenizer_files(folder, index).items()]
    try:
        _load_run_tokenizer(config, folder, index)
    except UserError as error:
        faults += [str(problem) for problem in error.problems]
    size = sum(made["bytes"] for made in records.values()) / 2**20
    return f"{len(records)} files of tokens ({size:,.1f} MiB) and the tokenizer are as they were written", faults


def check_enough_rows(index: dict[str, Any], config: Config, rows_per_step: int) -> None:
    """Errors: UserError unless each source has a row to train on and one to validate on, and one alone a whole step."""
    length, problems = config.batch.sequence_length, []
    for name, about in index["sources"].items():
        of = f" of {name}" if len(index["sources"]) > 1 else ""
        least = 1 if of else rows_per_step
        num_tokens, held = (about.get(side, {}).get("tokens", 0) for side in SIDES)
        if index["mode"] == "cached" and num_tokens < least * length + 1:
            saw = f"{count_rows(num_tokens, length):,} rows of {length} targets ({num_tokens:,} tokens)"
            want = f"at least one of {length} targets" if of else f"at least one step's {least:,} rows"
            keys = "data, batch.sequence_length or batch"
            problems.append(Problem(f"the training data{of} are too few", saw, want, keys))
        if held < length + 1:
            change = f"data.validation_share = {config.data.validation_share}"
            if about["held_out"].startswith("validation_"):
                change = f"data.{about['held_out']}"
            want = f"at least one row of {length} targets"
            problems.append(Problem(f"the validation data{of} are too few", f"{held:,} tokens", want, change))
    if problems:
        raise UserError(*problems)


# ---- what stands already


def _load_run_tokenizer(config: Config, folder: Path, index: dict[str, Any]) -> Tokenizer:
    """The tokenizer beside an index. Errors: UserError if it is another one than its ids were made with."""
    pad = index["fingerprint"]["pad"]  # not the config's: `prepare` compares the two and shows both
    tokenizer = Tokenizer.from_folder(folder, config.tokenizer.separator, pad)
    own = tokenizer.fingerprint(), tokenizer.separator_id, token_dtype(tokenizer).name
    if own != (index["tokenizer_sha256"], index["separator_id"], index["dtype"]):
        want = "what was prepared (delete the folder to prepare anew)"
        raise UserError(Problem("the run's tokenizer has changed", "another one", want, str(folder)))
    return tokenizer


def _repair_run_data(config: Config, index: dict[str, Any], listed: dict[str, SourceListing]) -> None:
    """Mend what is damaged of tokens and tokenizer. Errors: UserError for what cannot be mended."""
    repair_tokenizer(config.run_folder / "tokenizer", index, config.tokenizer)
    tokenizer = _load_run_tokenizer(config, config.run_folder / "tokenizer", index)
    home = run_tokens_folder(config, index)
    with _lock_folder(home.parent) if "cache" in index else contextlib.nullcontext():
        repair_tokens(config, index, home, listed, tokenizer)


def _compare_fingerprints(config: Config, index: dict[str, Any]) -> dict[str, SourceListing]:
    """The files of the sources that were listed, beside which the index stands as it is, or was written anew.

    Errors: UserError for another mode, or other data, than at first.
    """
    mode, file = index["mode"], data_index_file(config.run_folder)
    if config.data.mode not in ("auto", mode):
        what = f"the run {config.run.name!r} was prepared in the other mode"
        raise UserError(Problem(what, config.data.mode, f"{mode} or auto", "data.mode, or run.name"))
    made = index["fingerprint"]
    now, listed = remake_fingerprint(config, made, mode)
    changed = fingerprint_differences(made, now)
    if changed and not (config.data.allow_changed and only_documents_changed(changed)):
        raise changed_data_error(changed, config, file.parent)
    new = json.loads(json.dumps(index))
    if mode == "stream":  # files may have moved, too
        for name, listing in listed.items():
            new["sources"][name]["shards"] = shards_to_json(listing.shards)
    if changed:
        saw, was = describe_fingerprint_changes(changed)
        goes_on = "the tokens stay those that were prepared" if mode == "cached" else "they are read as they are now"
        print(f"data: changed since they were prepared, as data.allow_changed accepts: {saw}, was {was}; {goes_on}")
        new["fingerprint"] = now
        new.setdefault("changes", []).append({"saw": saw, "was": was})
    if new != index:
        write_data_index(file, new)
    return listed


def _check_stream_count(config: Config, num_streams: int, rows_per_step: int, world_size: int) -> None:
    """Errors: UserError if the rows of a step, or the ranks, do not fit the virtual streams."""
    asked = config.data.streams
    if asked not in (None, num_streams):
        want = f"{num_streams}, as chosen at its first start"
        raise UserError(Problem("the run has another number of streams", str(asked), want, "data.streams"))
    if rows_per_step % num_streams:
        what, want = "the streams do not divide the rows of a step", f"a divisor of {rows_per_step}"
        raise UserError(Problem(what, f"{num_streams} streams", want, "data.streams or batch"))
    if num_streams % world_size:
        fits = [str(n) for n in range(1, num_streams + 1) if num_streams % n == 0]
        what, want = f"the ranks do not divide the {num_streams} streams", f"one of {', '.join(fits)} ranks"
        raise UserError(Problem(what, f"{world_size} ranks", want, "the number of ranks, or data.streams"))


# ---- making it


def _choose_mode(config: Config, listed: dict[str, SourceListing]) -> tuple[str, str]:
    """The mode of a new run, and why."""
    data = config.data
    if data.mode != "auto":
        return data.mode, f"data.mode={data.mode}"
    if data.cache is not None:
        return "cached", "data.cache names a folder"
    if remote := [name for name, listing in listed.items() if not all(shard.is_local for shard in listing.all_shards)]:
        return "stream", f"{', '.join(remote)} {'is' if len(remote) == 1 else 'are'} not on this machine"
    mib = math.ceil(_local_mib(listed))
    if mib <= MAX_AUTO_CACHED_MIB:
        return "cached", f"{mib:,} MiB of local files, at most {MAX_AUTO_CACHED_MIB} are cached"
    return "stream", f"{mib:,} MiB of local files, only up to {MAX_AUTO_CACHED_MIB} are cached"


def _local_mib(listed: dict[str, SourceListing]) -> float:
    """Size of all sources on this machine; infinite if any is elsewhere."""
    shards = [shard for listing in listed.values() for shard in listing.all_shards]
    return sum(shard.size or 0 for shard in shards) / 2**20 if all(shard.is_local for shard in shards) else math.inf


def _prepare_cached(
    config: Config,
    given: Tokenizer | None,
    listed: dict[str, SourceListing],
    index: dict[str, Any],
    rows_per_step: int,
    home: Path,
) -> None:
    """HOME/tokenizer, HOME/data and their index."""
    tokenizer = given or _train_run_tokenizer(config, listed)
    index = index | _tokenizer_entries(tokenizer, 1)
    index["sources"] = tokenise.tokenise_sources(config, tokenizer, listed, index["fingerprint"], home / "data")
    check_enough_rows(index, config, rows_per_step)
    _write_tokenizer_and_index(home, tokenizer, index)


def _prepare_shared(
    config: Config, given: Tokenizer | None, listed: dict[str, SourceListing], index: dict[str, Any], rows_per_step: int
) -> None:
    """The same in data.cache, where it may stand already or be in the making; the run's own index refers to it."""
    assert config.data.cache is not None
    words = json.dumps(index["fingerprint"], sort_keys=True)
    key = hashlib.sha256(words.encode()).hexdigest()[:16]
    cache = config.data.cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    home = files.resolve_inside(cache, key, "data.cache")
    home.mkdir(exist_ok=True)
    _refuse_links(home)
    with _lock_folder(home):
        stood = data_index_file(home).exists()
        if not stood:
            _prepare_cached(config, given, listed, index, rows_per_step, home)
        made = read_data_index(data_index_file(home))
        if json.dumps(made["fingerprint"], sort_keys=True) != words:
            want = f"the data whose key is {key} (delete the folder to prepare anew)"
            raise UserError(Problem("the cache holds other data", format_value(made["fingerprint"]), want, str(home)))
        if stood:
            repair_tokenizer(home / "tokenizer", made, config.tokenizer)
        tokenizer = _load_run_tokenizer(config, home / "tokenizer", made)
        if stood:
            repair_tokens(config, made, home / "data", listed, tokenizer)
    check_enough_rows(made, config, rows_per_step)
    # Two tokenizers of equal ids may have other chat templates: the cache holds those of whoever made it.
    _write_tokenizer_and_index(
        config.run_folder, given or tokenizer, made | {"cache": key, "not_read": index["not_read"]}
    )


def _refuse_links(home: Path) -> None:
    """Errors: UserError for a link below a folder that many may write to: what is written there would go elsewhere."""
    for folder, folders, names in os.walk(home):
        for path in (Path(folder) / name for name in (*folders, *names)):
            if path.is_symlink():
                what, want = "the cache holds a link, which could lead anywhere", "files and folders alone"
                raise UserError(Problem(what, str(path.readlink()), want, f"{path}, or data.cache"))


@contextlib.contextmanager
def _lock_folder(home: Path) -> Iterator[None]:
    """While the block runs, no other process is in it with the same folder."""
    lock = filelock.FileLock(home / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"data: waits for the run that tokenises into {home}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare_stream(
    config: Config,
    given: Tokenizer | None,
    listed: dict[str, SourceListing],
    index: dict[str, Any],
    rows_per_step: int,
    world_size: int,
) -> None:
    """RUN/tokenizer, the validation side in RUN/data, and their index."""
    data, folder = config.data, config.run_folder / "data"
    num_streams = data.streams or largest_num_streams(rows_per_step, world_size)
    _check_stream_count(config, num_streams, rows_per_step, world_size)
    check_enough_documents(listed, data, num_streams)
    tokenizer = given or _train_run_tokenizer(config, listed)
    index = index | _tokenizer_entries(tokenizer, num_streams) | {"sources": {}}
    weights = tuple(part.weight for part in data.parts)
    rows = apportion_by_weight(max(config.evaluate.rows, len(weights)), weights)
    found = []
    write_bad_record_log(folder, [])
    for part, num_rows in zip(data.parts, rows, strict=True):
        num_tokens = num_rows * config.batch.sequence_length + 1
        about, bad = tokenise_held_out(
            part, data, listed[part.name], tokenizer, folder, num_tokens=num_tokens, num_streams=num_streams
        )
        index["sources"][part.name] = about
        found += bad
    for line in summarise_bad_records(found, folder):
        print(f"data: {line}", flush=True)
    check_enough_rows(index, config, rows_per_step)
    _write_tokenizer_and_index(config.run_folder, tokenizer, index)


def _tokenizer_entries(tokenizer: Tokenizer, num_streams: int) -> dict[str, Any]:
    return {
        "tokenizer_sha256": tokenizer.fingerprint(),
        "separator_id": tokenizer.separator_id,
        "dtype": token_dtype(tokenizer).name,
        "streams": num_streams,
    }


def _write_tokenizer_and_index(home: Path, tokenizer: Tokenizer, index: dict[str, Any]) -> None:
    """Beside whole tokens the tokenizer, and last of all the index; then what it does not name can go."""
    folder, file = home / "tokenizer", data_index_file(home)
    tokenizer.save(folder)
    beside = sorted(path for path in folder.iterdir() if path.is_file())
    for path in (*beside, folder):
        files.fsync_path(path)
    made = {path.name: {"bytes": path.stat().st_size, "sha256": files.file_sha256(path)} for path in beside}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_data_index(file, index | {"tokenizer_files": made})
    tokenise.remove_unlisted_files(file.parent, index["sources"])


def _train_run_tokenizer(config: Config, listed: dict[str, SourceListing]) -> Tokenizer:
    mib = _local_mib(listed)
    return train_bpe_tokenizer(config, listed, num_bytes=mib * 2**20, small=mib <= MAX_AUTO_CACHED_MIB)


def _check_vocab_size(num_ids: int, config: Config) -> None:
    if num_ids > config.model.vocab_size:
        what, want = (
            "the tokenizer has more ids than the model",
            f"at most model.vocab_size = {config.model.vocab_size:,}",
        )
        raise UserError(Problem(what, f"{num_ids:,}", want, "model.vocab_size or tokenizer"))
