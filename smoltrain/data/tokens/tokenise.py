"""Tokenise each source once: restartable, on all cores, and the same bytes whatever is killed and however many work.

The shards of a source are cut into parts, a function of the shards alone: FOLDER/NAME/{train,validation}-00000.bin and
so on, each with the places and hashes of its documents. part-00000.json says what a part was made from and is written
last, so a part is either whole or made anew. Once all are there, `tokens.joined` makes a stream of them.
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain import files
from smoltrain.config.schema import Config, DataSection, MixedSource
from smoltrain.data.documents import retry
from smoltrain.data.documents.bad_records import (
    BadRecordEntry,
    check_bad_record_share,
    log_bad_record,
    summarise_bad_records,
    write_bad_record_log,
)
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.documents.listing import SourceListing, has_own_validation
from smoltrain.data.documents.records import BadRecord
from smoltrain.data.documents.retry import ReaderHealth
from smoltrain.data.documents.shard import Shard
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers.round_trip import RoundTripCounter, round_trip_to_json
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.decontaminate import drop_held_out_documents
from smoltrain.data.tokens.index import INDEX_DIGEST_KEY, check_part_record, digest_index
from smoltrain.data.tokens.packing import encode_documents
from smoltrain.data.tokens.token_files import SIDES, TokenWriter, content_hash, join_token_parts, write_partial_json
from smoltrain.data.tokens.worker_pool import tokenise_in_processes
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import Problem, UserError

PART_BYTES = 64 * 2**20  # of shards as they lie on a disk: no part but the last of a source is shorter
DOCUMENTS, TRAIN, VALIDATION, BYTES, BAD, EMPTY = COUNTED = range(6)  # what is counted of a part
RECORDS = (DOCUMENTS, BAD, EMPTY)


@dataclass(frozen=True)
class TokenPart:
    """Consecutive shards of one source, and where their tokens go."""

    source: MixedSource
    number: int
    shards: tuple[Shard, ...]
    size: int  # their bytes, one of unknown size as PART_BYTES
    side: str | None  # of all of its documents; None: by their names
    folder: Path  # FOLDER/NAME
    made_of: str  # SHA-256 of all that its bytes are a function of

    @property
    def record_file(self) -> Path:
        """What says that the part is whole."""
        return self.folder / f"part-{self.number:05}.json"


@dataclass
class TokeniseJob:
    """All parts, and what a process needs to make any of them."""

    data: DataSection
    tokenizer: Tokenizer
    parts: list[TokenPart]
    counts: np.ndarray  # (parts, 6) int64, how far each part is; with several processes in memory that they share
    health: ReaderHealth

    def tokenise(self, number: int) -> None:
        """Make one part. Errors: UserError for bad data."""
        part, counts = self.parts[number], self.counts[number]
        counts[:] = 0
        bad: list[BadRecordEntry] = []
        writers = {side: TokenWriter(part.folder, f"{side}-{part.number:05}") for side in SIDES}
        spellers = {side: RoundTripCounter(self.tokenizer) for side in SIDES}
        try:
            current = None
            for piece in encode_documents(self._documents(number, bad), self.tokenizer, token_dtype(self.tokenizer)):
                side, hashed = piece.about
                if piece.about is not current:
                    current = piece.about
                    writers[side].begin(hashed)
                    counts[DOCUMENTS] += 1
                writers[side].add(piece.ids)
                spellers[side].add(piece)
                counts[TRAIN if side == "train" else VALIDATION] += len(piece.ids)
            made = {
                side: writer.commit() | {"spelling": round_trip_to_json(spellers[side].found)}
                for side, writer in writers.items()
            }
        finally:
            for writer in writers.values():
                writer.discard()
        record = {"made_of": part.made_of, **made, "bad": [asdict(b) for b in bad], "empty": int(counts[EMPTY])}
        write_partial_json(part.record_file, record | {INDEX_DIGEST_KEY: digest_index(record)})
        counts[BYTES] = part.size

    def _documents(self, number: int, bad: list[BadRecordEntry]) -> Iterator[tuple[tuple[str, int], str]]:
        """((side, content hash), text) of each document of a part; what is bad goes to the log and into `bad`."""
        part, counts = self.parts[number], self.counts[number]
        of_source = [other.source.name == part.source.name for other in self.parts]
        for shard in part.shards:
            end = counts[BYTES] + (shard.size or 0)
            for item in retry.read_records_with_retry(shard, part.source, data=self.data, health=self.health):
                if isinstance(item, BadRecord) and item.empty:
                    counts[EMPTY] += 1
                elif isinstance(item, BadRecord):
                    counts[BAD] += 1
                    count, seen = self.counts[of_source, BAD].sum(), self.counts[of_source][:, RECORDS].sum()
                    name = part.source.name
                    bad.append(log_bad_record(part.folder.parent, name, item, int(count), int(seen), self.data))
                else:
                    side = "validation" if is_held_out(item.name, self.data.validation_share) else "train"
                    yield (part.side or side, content_hash(item.text)), item.text
                    counts[BYTES] = min(counts[BYTES] + len(item.text), end)  # near enough, until the shard ends
            counts[BYTES] = end

    def state(self) -> tuple[str, float]:
        """How far all parts are together: in words, and as a share of the bytes."""
        done = self.counts.sum(0)
        words = f"{done[TRAIN]:,} train tokens and {done[VALIDATION]:,} validation tokens"
        return f"{words} of {done[DOCUMENTS]:,} documents", done[BYTES] / max(1, sum(part.size for part in self.parts))


def tokenise_sources(
    config: Config, tokenizer: Tokenizer, listed: dict[str, SourceListing], fingerprint: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """All tokens of all sources, each into FOLDER/NAME/; goes on with those parts that are whole.

    Returns what the index says of each source. Errors: UserError for bad data, and a source without documents.
    """
    parts = [
        part
        for source in config.data.parts
        for part in _plan_parts(source, listed[source.name], fingerprint, tokenizer, folder / source.name)
    ]
    work = TokeniseJob(config.data, tokenizer, parts, np.zeros((len(parts), len(COUNTED)), np.int64), ReaderHealth())
    itemsize = token_dtype(tokenizer).itemsize
    whole = {number: record for number, part in enumerate(parts) if (record := _load_whole_part(part, itemsize))}
    for number, record in whole.items():
        sides = [record[side] for side in SIDES]
        num_documents, num_tokens = sum(side["documents"] for side in sides), [side["tokens"] for side in sides]
        work.counts[number] = num_documents, *num_tokens, parts[number].size, len(record["bad"]), record.get("empty", 0)
    for source in config.data.parts:
        files.resolve_inside(folder, source.name, str(folder))
        mine = [number for number in whole if parts[number].source.name == source.name]
        names = {name for number in mine for name in (parts[number].record_file.name, *_files_of_record(whole[number]))}
        _remove_other_files(folder / source.name, names)
    write_bad_record_log(folder, _bad_records_of(whole.values()))
    _tokenise_parts(work, [number for number in range(len(parts)) if number not in whole], folder)

    records = [json.loads(part.record_file.read_text(encoding="utf-8")) for part in parts]
    found = _bad_records_of(records)
    write_bad_record_log(folder, found)
    for line in summarise_bad_records(found, folder):
        print(f"data: {line}", flush=True)
    for source in config.data.parts:
        of_source = [part.source.name == source.name for part in parts]
        if num_empty := int(work.counts[of_source, EMPTY].sum()):
            print(f"data: {_count_phrase(num_empty, 'empty record', source.name)} passed over", flush=True)
        bad = [bad for bad in found if bad.source == source.name]
        check_bad_record_share(folder, source.name, bad, int(work.counts[of_source][:, RECORDS].sum()), config.data)
    made: dict[str, list[dict[str, Any]]] = {source.name: [] for source in config.data.parts}
    for part, record in zip(parts, records, strict=True):
        made[part.source.name].append(record)
    own = {source.name for source in config.data.parts if has_own_validation(source)}
    dtype = token_dtype(tokenizer)
    made, copies = drop_held_out_documents(made, own, folder, dtype, config.data.validation_share)
    about = {}
    for source in config.data.parts:
        name = source.name
        about[name] = _join_source(source, config.data, made[name], folder / name, dtype) | {"copies": copies[name]}
        if copies[name]:
            print(
                f"data: {_count_phrase(copies[name], 'document', name)} not trained on: the text is held out",
                flush=True,
            )
    return about


def _count_phrase(count: int, what: str, source: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)} of {source} {'are' if count > 1 else 'is'}"


def remove_unlisted_files(folder: Path, sources: dict[str, Any]) -> None:
    """Remove whatever is in FOLDER/NAME of each source but not in the index: what is only of use to a restart."""
    for name, about in sources.items():
        _remove_other_files(
            files.resolve_inside(folder, name, str(folder)),
            {file for side in SIDES if side in about for file in about[side]["files"]},
        )


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds the ids."""
    return np.dtype(np.uint16 if tokenizer.num_ids <= 2**16 else np.uint32)


def no_documents_error(name: str, what: str, data: DataSection) -> UserError:
    """A source of which nothing can be trained, or nothing be held out."""
    key = f"data.sources.{name}" if data.sources else "data"
    return UserError(Problem(f"the source {name!r} has no {what}", "none", "at least one", key))


def _plan_parts(
    source: MixedSource, listing: SourceListing, fingerprint: dict[str, Any], tokenizer: Tokenizer, folder: Path
) -> list[TokenPart]:
    """The shards in groups of PART_BYTES or a little more, the training side's first."""
    about = fingerprint["sources"][source.name]
    settings = {key: value for key, value in about.items() if not isinstance(value, dict)}
    own = has_own_validation(source)
    made, group, size = [], [], 0
    for side, known, shards in (
        ("train" if own else None, about.get("files", {}), listing.shards),
        ("validation", about.get("validation_files", {}), listing.held_out),
    ):
        for number, shard in enumerate(shards):
            group.append(shard)
            size += PART_BYTES if shard.size is None else shard.size
            if size >= PART_BYTES or number == len(shards) - 1:
                of = [[shard.name, known.get(shard.name, shard.version)] for shard in group]
                raw = json.dumps([settings, of, side, tokenizer.fingerprint(), tokenizer.separator], sort_keys=True)
                made_of = hashlib.sha256(raw.encode()).hexdigest()
                made.append(TokenPart(source, len(made), tuple(group), size, side, folder, made_of))
                group, size = [], 0
    return made


def _load_whole_part(part: TokenPart, itemsize: int) -> dict[str, Any] | None:
    """The record of a part that is done, made of the same, and as it was written; its ids take `itemsize` bytes."""
    try:
        tree = json.loads(files.read_text_file(part.record_file))
        record = check_part_record(tree, part.number, itemsize)
        if record is None or record["made_of"] != part.made_of:
            return None
        whole = all(
            files.file_sha256(part.folder / name) == made["sha256"] for name, made in _files_of_record(record).items()
        )
    except (OSError, ValueError, RecursionError):
        return None
    return record if whole else None


def _files_of_record(record: dict[str, Any]) -> dict[str, Any]:
    return {name: made for side in SIDES for name, made in record[side]["files"].items()}


def _bad_records_of(records: Any) -> list[BadRecordEntry]:
    return [BadRecordEntry(**bad) for record in records for bad in record["bad"]]


def _remove_other_files(folder: Path, names: set[str]) -> None:
    """Remove every other file of a folder."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in names:
            path.unlink()


def _tokenise_parts(work: TokeniseJob, todo: list[int], folder: Path) -> None:
    """Make these parts, on as many processes as there are cores and large parts for."""
    num_large = math.ceil(sum(work.parts[number].size for number in todo) / PART_BYTES)
    num_processes = min(len(todo), num_large, num_cores())
    if num_processes > 1:
        saved = folder / "tokenizer.partial"
        work.tokenizer.save(saved)
        try:
            with report_progress(work.state, work.health):
                tokenise_in_processes(work, todo, num_processes, saved)
        finally:
            shutil.rmtree(saved)
            for part in work.parts:  # of a process that was stopped
                for path in part.folder.glob("*.partial"):
                    path.unlink()
    else:
        with report_progress(work.state, work.health):
            for number in todo:
                work.tokenise(number)


def _join_source(
    source: MixedSource, data: DataSection, records: Sequence[dict[str, Any]], folder: Path, dtype: np.dtype
) -> dict[str, Any]:
    """What the index says of one source, and how its validation side was held out."""
    num = {side: sum(record[side]["documents"] for record in records) for side in SIDES}
    if not any(num.values()):
        raise no_documents_error(source.name, "document", data)
    about: dict[str, Any] = {
        "bad_records": sum(len(record["bad"]) for record in records),
        "empty_records": sum(record.get("empty", 0) for record in records),
    }
    if all(num.values()):
        option = "validation_split" if source.validation_split else "validation_path"
        about["held_out"] = option if has_own_validation(source) else "documents"
        return about | {side: join_token_parts(folder, side, [r[side] for r in records], dtype) for side in SIDES}
    (only,) = (side for side in SIDES if num[side])
    if has_own_validation(source):
        raise no_documents_error(
            source.name, "document to validate on" if only == "train" else "document to train on", data
        )
    parts = [_rename_to_whole(record[only], folder, only) for record in records]
    whole = join_token_parts(folder, "whole", parts, dtype)
    cut = whole["tokens"] - math.ceil(whole["tokens"] * data.validation_share)
    ends = np.append(np.fromfile(folder / "whole.starts", np.uint64)[1:], np.uint64(whole["tokens"]))
    num_train = int((ends <= cut).sum())  # documents that end before the cut
    train = {"tokens": cut, "documents": num_train}
    validation = {"tokens": whole["tokens"] - cut, "documents": whole["documents"] - num_train, "first": cut}
    return about | {"held_out": "tail", "train": whole | train, "validation": whole | validation}


def _rename_to_whole(made: dict[str, Any], folder: Path, side: str) -> dict[str, Any]:
    """A part of a side's files, called whole-* as they hold both sides; a restart would make the part anew."""
    names = {name: name.replace(side, "whole", 1) for name in made["files"]}
    for name, new in names.items():
        with contextlib.suppress(FileNotFoundError):
            (folder / name).rename(folder / new)
    return made | {"files": {names[name]: about for name, about in made["files"].items()}}
