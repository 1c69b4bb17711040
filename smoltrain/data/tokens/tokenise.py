"""Tokenise each source once: restartable, on all cores, and the same bytes whatever is killed and however many work.

Parts that are whole are used as they are (token_parts.py), the others are made anew. Once all are there, training
documents that are held out too are dropped (decontaminate.py), and what remains is joined to one stream of each side.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain import files
from smoltrain.config.schema import Config, DataSection, MixedSource
from smoltrain.data.documents.bad_records import (
    BadRecordEntry,
    check_bad_record_share,
    summarise_bad_records,
    write_bad_record_log,
)
from smoltrain.data.documents.listing import SourceListing, has_own_validation, source_config_key
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import token_parts
from smoltrain.data.tokens.decontaminate import CleanSource, drop_held_out_documents
from smoltrain.data.tokens.index import SIDES, STARTS, HeldOutRule, IndexSide, IndexSource, PartRecord, PartSide
from smoltrain.data.tokens.packing import token_dtype
from smoltrain.data.tokens.token_files import join_token_parts
from smoltrain.data.tokens.token_parts import (
    RECORD_COUNTS,
    TOKEN_COUNTS,
    PartCount,
    TokeniseJob,
    load_whole_part,
    plan_parts,
)
from smoltrain.data.tokens.worker_pool import tokenise_in_processes
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import Problem, UserError


def tokenise_sources(
    config: Config, tokenizer: Tokenizer, listed: dict[str, SourceListing], fingerprint: dict[str, Any], folder: Path
) -> dict[str, IndexSource]:
    """All tokens of all sources, each into FOLDER/NAME/; goes on with those parts that are whole.

    Errors: UserError for bad data, and a source without documents.
    """
    data = config.data
    parts = [
        part
        for source in data.parts
        for part in plan_parts(source, listed[source.name], fingerprint, tokenizer, folder / source.name)
    ]
    counts = np.zeros((len(parts), len(PartCount)), np.int64)
    job = TokeniseJob(data, tokenizer, parts, counts, ReaderHealth())

    whole = _reuse_whole_parts(job)
    known: dict[str, set[str]] = {source.name: set() for source in data.parts}
    for number, record in whole.items():
        known[parts[number].source.name] |= {parts[number].record_file.name, *record.files}
    remove_other_files(folder, known)
    write_bad_record_log(folder, _list_bad_records(whole.values()))
    _tokenise_parts(job, [number for number in range(len(parts)) if number not in whole], folder)

    records: dict[str, list[PartRecord]] = {source.name: [] for source in data.parts}
    for part in parts:
        tree = json.loads(part.record_file.read_text(encoding="utf-8"))
        records[part.source.name].append(PartRecord.model_validate(tree))
    _report_skipped_records(job, records, folder)

    own = {source.name for source in data.parts if has_own_validation(source)}
    clean = drop_held_out_documents(records, own, folder, token_dtype(tokenizer), data.validation_share)
    made = {}
    for source in data.parts:
        name = source.name
        made[name] = _join_source(source, data, listed[name], clean[name], folder / name, token_dtype(tokenizer))
        if clean[name].num_copies:
            copies = _count_phrase(clean[name].num_copies, "document", name)
            print(f"data: {copies} not trained on: the text is held out", flush=True)
    return made


def remove_other_files(folder: Path, known: dict[str, set[str]]) -> None:
    """Remove from FOLDER/NAME of each source all files but those that are known, by source."""
    for name, file_names in known.items():
        source_folder = files.resolve_inside(folder, name, str(folder))
        for path in source_folder.iterdir() if source_folder.exists() else ():
            if path.name not in file_names:
                path.unlink()


def no_documents_error(name: str, what: str, data: DataSection) -> UserError:
    """A source of which nothing can be trained, or nothing be held out."""
    return UserError(
        Problem(f"the source {name!r} has no {what}", "none", "at least one", source_config_key(name, data))
    )


def held_out_rule(source: MixedSource) -> HeldOutRule:
    """How a source's validation side is told apart, as the index calls it, if it is not the tail."""
    if not has_own_validation(source):
        return "documents"
    return "validation_split" if source.validation_split else "validation_path"


def _reuse_whole_parts(job: TokeniseJob) -> dict[int, PartRecord]:
    """The records of the parts that stand already, by number; they are counted as done."""
    itemsize = token_dtype(job.tokenizer).itemsize
    whole = {}
    for number, part in enumerate(job.parts):
        record = load_whole_part(part, itemsize)
        if record is None:
            continue
        whole[number] = record
        counts = job.counts[number]
        for side, made in record.sides.items():
            counts[PartCount.DOCUMENTS] += made.documents
            counts[TOKEN_COUNTS[side]] = made.tokens
        counts[PartCount.BYTES] = part.size
        counts[PartCount.BAD] = len(record.bad)
        counts[PartCount.EMPTY] = record.empty
    return whole


def _tokenise_parts(job: TokeniseJob, todo: list[int], folder: Path) -> None:
    """Make these parts, on as many processes as there are cores and large parts for."""
    num_large = math.ceil(sum(job.parts[number].size for number in todo) / token_parts.PART_BYTES)
    num_processes = min(len(todo), num_large, num_cores())
    if num_processes > 1:
        saved = folder / "tokenizer.partial"
        job.tokenizer.save(saved)
        try:
            with report_progress(job.describe_progress, job.health):
                tokenise_in_processes(job, todo, num_processes, saved)
        finally:
            shutil.rmtree(saved)
            for part in job.parts:  # of a process that was stopped
                for path in part.folder.glob("*.partial"):
                    path.unlink()
    else:
        with report_progress(job.describe_progress, job.health):
            for number in todo:
                job.tokenise_part(number)


def _report_skipped_records(job: TokeniseJob, records: dict[str, list[PartRecord]], folder: Path) -> None:
    """Log and print bad and empty records. Errors: UserError if more of a source's records are bad than may be."""
    bad = {name: _list_bad_records(parts) for name, parts in records.items()}
    all_bad = [entry for entries in bad.values() for entry in entries]
    write_bad_record_log(folder, all_bad)
    for line in summarise_bad_records(all_bad, folder):
        print(f"data: {line}", flush=True)
    for name, entries in bad.items():
        counts = job.count_records(name)
        num_empty = int(counts[PartCount.EMPTY])
        if num_empty:
            print(f"data: {_count_phrase(num_empty, 'empty record', name)} passed over", flush=True)
        check_bad_record_share(folder, name, entries, int(counts[RECORD_COUNTS].sum()), job.data)


def _list_bad_records(records: Any) -> list[BadRecordEntry]:
    return [BadRecordEntry(**bad) for record in records for bad in record.bad]


def _count_phrase(count: int, what: str, source: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)} of {source} {'are' if count > 1 else 'is'}"


def _join_source(
    source: MixedSource, data: DataSection, listing: SourceListing, clean: CleanSource, folder: Path, dtype: np.dtype
) -> IndexSource:
    """One stream of each side of a source, cut out of one stream where all documents are on the same side."""
    records = clean.records
    num_documents = {side: sum(record.sides[side].documents for record in records) for side in SIDES}
    if not any(num_documents.values()):
        raise no_documents_error(source.name, "document", data)
    if all(num_documents.values()):
        rule = held_out_rule(source)
        train, validation = (
            join_token_parts(folder, side, [record.sides[side] for record in records], dtype) for side in SIDES
        )
    else:
        (only,) = (side for side in SIDES if num_documents[side])
        if has_own_validation(source):
            what = "document to validate on" if only == "train" else "document to train on"
            raise no_documents_error(source.name, what, data)
        rule = "tail"
        parts = [_rename_to_whole(record.sides[only], folder, only) for record in records]
        whole = join_token_parts(folder, "whole", parts, dtype)
        train, validation = _cut_tail(whole, folder, data.validation_share)
    return IndexSource(
        bad_records=sum(len(record.bad) for record in records),
        empty_records=sum(record.empty for record in records),
        copies=clean.num_copies,
        repeated=clean.num_repeated,
        held_out=rule,
        train=train,
        validation=validation,
        shard_names=[shard.name for shard in listing.all_shards],
    )


def _cut_tail(whole: IndexSide, folder: Path, share: float) -> tuple[IndexSide, IndexSide]:
    """The training side and, of the last tokens, the validation side of one stream; a document may be cut in two."""
    cut = whole.tokens - math.ceil(whole.tokens * share)
    (starts_file,) = whole.file_names(STARTS)
    ends = np.append(np.fromfile(folder / starts_file, np.uint64)[1:], np.uint64(whole.tokens))
    num_train = int((ends <= cut).sum())  # documents that end before the cut
    train = whole.model_copy(update={"tokens": cut, "documents": num_train})
    rest = {"tokens": whole.tokens - cut, "documents": whole.documents - num_train, "first": cut}
    return train, whole.model_copy(update=rest)


def _rename_to_whole(part: PartSide, folder: Path, side: str) -> PartSide:
    """A part of a side's files, called whole-* as they hold both sides; a restart would make the part anew."""
    names = {name: name.replace(side, "whole", 1) for name in part.files}
    for name, new in names.items():
        with contextlib.suppress(FileNotFoundError):
            (folder / name).rename(folder / new)
    return part.model_copy(update={"files": {names[name]: file for name, file in part.files.items()}})
