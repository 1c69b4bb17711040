"""What is made once, before the first step: RUN/tokenizer/ and RUN/data/index.json with the tokens that it names.

In cached mode these are all tokens (tokenise.py), in RUN/data or in a folder that runs share; in stream mode those of
the validation side (tokenise_validation.py). index.json says what they were made from. It is written last, so that it
exists only beside whole files: a preparation that was killed goes on with what is whole, and makes anew what is not.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from smoltrain import files
from smoltrain.config.schema import Config
from smoltrain.data.documents.bad_records import summarise_bad_records, write_bad_record_log
from smoltrain.data.documents.check_files import check_enough_documents
from smoltrain.data.documents.listing import SourceListing
from smoltrain.data.order import apportion_by_weight, largest_num_streams
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import tokenise
from smoltrain.data.tokens.check_fit import check_enough_rows, check_stream_count
from smoltrain.data.tokens.check_tokens import repair_tokenizer, repair_tokens
from smoltrain.data.tokens.fingerprints import (
    changed_data_error,
    describe_fingerprint_changes,
    fingerprint_differences,
    only_documents_changed,
    remake_fingerprint,
)
from smoltrain.data.tokens.index import DataIndex, data_index_file, read_data_index, write_data_index
from smoltrain.data.tokens.load_prepared import (
    load_prepared_data,
    load_run_tokenizer,
    read_run_index,
    run_tokens_folder,
)
from smoltrain.data.tokens.plan_preparation import Preparation, plan_preparation
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.tokenise_validation import shards_to_json, tokenise_held_out
from smoltrain.errors import Problem, UserError, format_value
from smoltrain.terminal import print_text


def prepare_run_data(
    config: Config, rows_per_step: int | None = None, world_size: int = 1, *, ahead: bool = False
) -> PreparedData:
    """Make the run's tokens, or find them made. One process calls this; the others `load_prepared_data` afterwards.

    rows_per_step is over all ranks; None is what batch says for one rank. The first call chooses the mode (`ahead` of
    a run always cached, unless data.mode says stream) and the number of streams, gets or trains the tokenizer, and
    tokenises. Later calls tokenise nothing: they compare fingerprints (a local file that is cached is hashed again),
    repair damaged files, and may rewrite the index.

    Errors: UserError for bad documents or tokenizers, ids that the model has no room for, too few tokens for a step or
    for validation, streams that do not fit, and data other than those already prepared.
    """
    rows_per_step = rows_per_step or config.batch.rows(1)
    if data_index_file(config.run_folder).exists():
        return _check_prepared_data(config, rows_per_step, world_size)
    plan = plan_preparation(config, rows_per_step, world_size, ahead=ahead)
    if plan.mode == "stream":
        _prepare_stream(plan)
    elif config.data.cache is None:
        _prepare_cached(plan, config.run_folder)
    else:
        _prepare_shared(plan, config.data.cache)
    prepared = load_prepared_data(config)
    for line in prepared.warnings(config.model.vocab_size):
        print_text(f"WARNING: {line}")
    return prepared


def copy_prepared_data(source: Path, target: Path) -> None:
    """Another run's tokenizer and tokens into the folder of a run that has none; an index there would say otherwise."""
    for name in ("tokenizer", "data"):
        shutil.rmtree(target / name, ignore_errors=True)  # index.json comes last, so what stands here is half a copy
    shutil.copytree(source / "tokenizer", target / "tokenizer")
    shutil.copytree(source / "data", target / "data", ignore=shutil.ignore_patterns("index.json"))
    shutil.copy(data_index_file(source), data_index_file(target))


# ---- what stands already


def _check_prepared_data(config: Config, rows_per_step: int, world_size: int) -> PreparedData:
    """What an earlier start prepared, if it is of the same data and fits; damaged files are repaired."""
    index = read_run_index(config)
    listed = _compare_fingerprints(config, index)
    repair_tokenizer(config.run_folder / "tokenizer", index, config.tokenizer)
    tokenizer = load_run_tokenizer(config, config.run_folder / "tokenizer", index)
    home = run_tokens_folder(config, index)
    with _lock_folder(home.parent) if index.cache is not None else contextlib.nullcontext():
        repair_tokens(config, index, home, listed, tokenizer)
    prepared = load_prepared_data(config)
    if prepared.mode == "stream":
        check_stream_count(config, prepared.streams, rows_per_step, world_size)
    check_enough_rows(prepared.index, config, rows_per_step)
    return prepared


def _compare_fingerprints(config: Config, index: DataIndex) -> dict[str, SourceListing]:
    """The files of the sources that were listed, beside which the index stands as it is, or was written anew.

    Errors: UserError for another mode, or other data, than at first.
    """
    mode, file = index.mode, data_index_file(config.run_folder)
    if config.data.mode not in ("auto", mode):
        what = f"the run {config.run.name!r} was prepared in the other mode"
        raise UserError(Problem(what, config.data.mode, f"{mode} or auto", "data.mode, or run.name"))
    before = index.fingerprint.to_json()
    now, listed = remake_fingerprint(config, before, mode)
    changed = fingerprint_differences(before, now)
    if changed and not (config.data.allow_changed and only_documents_changed(changed)):
        raise changed_data_error(changed, config, file.parent)
    old = index.to_json()
    new = json.loads(json.dumps(old))
    if mode == "stream":  # files may have moved, too
        for name, listing in listed.items():
            new["sources"][name]["shards"] = [list(shard) for shard in shards_to_json(listing.shards)]
    if changed:
        saw, was = describe_fingerprint_changes(changed)
        goes_on = "the tokens stay those that were prepared" if mode == "cached" else "they are read as they are now"
        print(f"data: changed since they were prepared, as data.allow_changed accepts: {saw}, was {was}; {goes_on}")
        new["fingerprint"] = now
        new.setdefault("changes", []).append({"saw": saw, "was": was})
    if new != old:
        write_data_index(file, new)
    return listed


# ---- the first start


def _prepare_cached(plan: Preparation, home: Path) -> None:
    """HOME/tokenizer, HOME/data and their index."""
    tokenizer = plan.get_tokenizer()
    sources = tokenise.tokenise_sources(plan.config, tokenizer, plan.listed, plan.fingerprint, home / "data")
    _write_tokenizer_and_index(home, tokenizer, plan.make_index(tokenizer, 1, sources))


def _prepare_shared(plan: Preparation, cache: Path) -> None:
    """The same in data.cache, where it may stand already or be in the making; the run's own index refers to it."""
    config = plan.config
    fingerprint = json.dumps(plan.fingerprint, sort_keys=True)
    key = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    home = files.resolve_inside(cache, key, "data.cache")
    home.mkdir(exist_ok=True)
    _refuse_links(home)
    with _lock_folder(home):
        stood = data_index_file(home).exists()
        if not stood:
            _prepare_cached(plan, home)
        index = read_data_index(data_index_file(home))
        made = index.fingerprint.to_json()
        if json.dumps(made, sort_keys=True) != fingerprint:
            want = f"the data whose key is {key} (delete the folder to prepare anew)"
            raise UserError(Problem("the cache holds other data", format_value(made), want, str(home)))
        if stood:
            repair_tokenizer(home / "tokenizer", index, config.tokenizer)
        tokenizer = load_run_tokenizer(config, home / "tokenizer", index)
        if stood:
            repair_tokens(config, index, home / "data", plan.listed, tokenizer)
    check_enough_rows(index, config, plan.rows_per_step)
    # Two tokenizers of equal ids may have other chat templates: the cache holds those of whoever made it.
    own = index.model_copy(update={"cache": key, "not_read": plan.not_read})
    _write_tokenizer_and_index(config.run_folder, plan.given or tokenizer, own)


def _prepare_stream(plan: Preparation) -> None:
    """RUN/tokenizer, the validation side in RUN/data, and their index."""
    config, data = plan.config, plan.config.data
    folder = config.run_folder / "data"
    num_streams = data.streams or largest_num_streams(plan.rows_per_step, plan.world_size)
    check_stream_count(config, num_streams, plan.rows_per_step, plan.world_size)
    check_enough_documents(plan.listed, data, num_streams)
    tokenizer = plan.get_tokenizer()
    weights = tuple(part.weight for part in data.parts)
    rows = apportion_by_weight(max(config.evaluate.rows, len(weights)), weights)
    sources, all_bad = {}, []
    write_bad_record_log(folder, [])
    for part, num_rows in zip(data.parts, rows, strict=True):
        num_tokens = num_rows * config.batch.sequence_length + 1
        sources[part.name], bad = tokenise_held_out(
            part, data, plan.listed[part.name], tokenizer, folder, num_tokens=num_tokens, num_streams=num_streams
        )
        all_bad += bad
    for line in summarise_bad_records(all_bad, folder):
        print(f"data: {line}", flush=True)
    _write_tokenizer_and_index(config.run_folder, tokenizer, plan.make_index(tokenizer, num_streams, sources))


def _write_tokenizer_and_index(home: Path, tokenizer: Tokenizer, index: DataIndex) -> None:
    """Beside whole tokens the tokenizer, and last of all the index; then what it does not name can go."""
    folder, file = home / "tokenizer", data_index_file(home)
    tokenizer.save(folder)
    saved = sorted(path for path in folder.iterdir() if path.is_file())
    for path in (*saved, folder):
        files.fsync_path(path)
    made = {path.name: {"bytes": path.stat().st_size, "sha256": files.file_sha256(path)} for path in saved}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_data_index(file, index.to_json() | {"tokenizer_files": made})
    listed = {name: {file for side in source.sides for file in side.files} for name, source in index.sources.items()}
    tokenise.remove_other_files(file.parent, listed)  # what is only of use to a restart


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
