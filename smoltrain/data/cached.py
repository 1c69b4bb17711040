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
from smoltrain.data import bad_records, both_sides, faults, fingerprints, index, packing, pool, spelling, tokens
from smoltrain.data.bad_records import Bad
from smoltrain.data.both_sides import SIDES
from smoltrain.data.faults import Health
from smoltrain.data.fingerprints import Listing
from smoltrain.data.progress import telling
from smoltrain.data.readers import BadRecord
from smoltrain.data.sources import Shard
from smoltrain.data.spelling import Speller
from smoltrain.data.split import held_out
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.data.tokens import Writer
from smoltrain.errors import Problem, UserError
from smoltrain.schema import Config, DataSection, MixedSource

PART_BYTES = 64 * 2**20  # of shards as they lie on a disk: no part but the last of a source is shorter
DOCUMENTS, TRAIN, VALIDATION, BYTES, BAD, EMPTY = COUNTED = range(6)  # what is counted of a part
RECORDS = (DOCUMENTS, BAD, EMPTY)


@dataclass(frozen=True)
class Part:
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
class Work:
    """All parts, and what a process needs to make any of them."""

    data: DataSection
    tokenizer: Tokenizer
    parts: list[Part]
    counts: np.ndarray  # (parts, 6) int64, how far each part is; with several processes in memory that they share
    health: Health

    def tokenise(self, number: int) -> None:
        """Make one part. Errors: UserError for bad data."""
        part, counts = self.parts[number], self.counts[number]
        counts[:] = 0
        bad: list[Bad] = []
        writers = {side: Writer(part.folder, f"{side}-{part.number:05}") for side in SIDES}
        spellers = {side: Speller(self.tokenizer) for side in SIDES}
        try:
            current = None
            for piece in packing.encoded(self._documents(number, bad), self.tokenizer, dtype_of(self.tokenizer)):
                side, hashed = piece.about
                if piece.about is not current:
                    current = piece.about
                    writers[side].begin(hashed)
                    counts[DOCUMENTS] += 1
                writers[side].add(piece.ids)
                spellers[side].add(piece)
                counts[TRAIN if side == "train" else VALIDATION] += len(piece.ids)
            made = {
                side: writer.commit() | {"spelling": spelling.to_json(spellers[side].found)}
                for side, writer in writers.items()
            }
        finally:
            for writer in writers.values():
                writer.discard()
        record = {"made_of": part.made_of, **made, "bad": [asdict(b) for b in bad], "empty": int(counts[EMPTY])}
        tokens.write_json(part.record_file, record | {index.DIGEST: index.seal(record)})
        counts[BYTES] = part.size

    def _documents(self, number: int, bad: list[Bad]) -> Iterator[tuple[tuple[str, int], str]]:
        """((side, content hash), text) of each document of a part; what is bad goes to the log and into `bad`."""
        part, counts = self.parts[number], self.counts[number]
        of_source = [other.source.name == part.source.name for other in self.parts]
        for shard in part.shards:
            end = counts[BYTES] + (shard.size or 0)
            for item in faults.documents(shard, part.source, data=self.data, health=self.health):
                if isinstance(item, BadRecord) and item.empty:
                    counts[EMPTY] += 1
                elif isinstance(item, BadRecord):
                    counts[BAD] += 1
                    count, seen = self.counts[of_source, BAD].sum(), self.counts[of_source][:, RECORDS].sum()
                    name = part.source.name
                    bad.append(bad_records.note(part.folder.parent, name, item, int(count), int(seen), self.data))
                else:
                    side = "validation" if held_out(item.name, self.data.validation_share) else "train"
                    yield (part.side or side, tokens.content_hash(item.text)), item.text
                    counts[BYTES] = min(counts[BYTES] + len(item.text), end)  # near enough, until the shard ends
            counts[BYTES] = end

    def state(self) -> tuple[str, float]:
        """How far all parts are together: in words, and as a share of the bytes."""
        done = self.counts.sum(0)
        words = f"{done[TRAIN]:,} train tokens and {done[VALIDATION]:,} validation tokens"
        return f"{words} of {done[DOCUMENTS]:,} documents", done[BYTES] / max(1, sum(part.size for part in self.parts))


def tokenise(
    config: Config, tokenizer: Tokenizer, listed: dict[str, Listing], fingerprint: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """All tokens of all sources, each into FOLDER/NAME/; goes on with those parts that are whole.

    Returns what the index says of each source. Errors: UserError for bad data, and a source without documents.
    """
    parts = [
        part
        for source in config.data.parts
        for part in _parts(source, listed[source.name], fingerprint, tokenizer, folder / source.name)
    ]
    work = Work(config.data, tokenizer, parts, np.zeros((len(parts), len(COUNTED)), np.int64), Health())
    itemsize = dtype_of(tokenizer).itemsize
    whole = {number: record for number, part in enumerate(parts) if (record := _whole(part, itemsize))}
    for number, record in whole.items():
        sides = [record[side] for side in SIDES]
        num_documents, num_tokens = sum(side["documents"] for side in sides), [side["tokens"] for side in sides]
        work.counts[number] = num_documents, *num_tokens, parts[number].size, len(record["bad"]), record.get("empty", 0)
    for source in config.data.parts:
        files.inside(folder, source.name, str(folder))
        mine = [number for number in whole if parts[number].source.name == source.name]
        names = {name for number in mine for name in (parts[number].record_file.name, *_files(whole[number]))}
        _keep(folder / source.name, names)
    bad_records.write(folder, _bad(whole.values()))
    _run(work, [number for number in range(len(parts)) if number not in whole], folder)

    records = [json.loads(part.record_file.read_text(encoding="utf-8")) for part in parts]
    found = _bad(records)
    bad_records.write(folder, found)
    for line in bad_records.summary(found, folder):
        print(f"data: {line}", flush=True)
    for source in config.data.parts:
        of_source = [part.source.name == source.name for part in parts]
        if num_empty := int(work.counts[of_source, EMPTY].sum()):
            print(f"data: {_many(num_empty, 'empty record', source.name)} passed over", flush=True)
        bad = [bad for bad in found if bad.source == source.name]
        bad_records.check(folder, source.name, bad, int(work.counts[of_source][:, RECORDS].sum()), config.data)
    made: dict[str, list[dict[str, Any]]] = {source.name: [] for source in config.data.parts}
    for part, record in zip(parts, records, strict=True):
        made[part.source.name].append(record)
    own = {source.name for source in config.data.parts if fingerprints.holds_out_by_itself(source)}
    dtype = dtype_of(tokenizer)
    made, copies = both_sides.apart(made, own, folder, dtype, config.data.validation_share)
    about = {}
    for source in config.data.parts:
        name = source.name
        about[name] = _joined(source, config.data, made[name], folder / name, dtype) | {"copies": copies[name]}
        if copies[name]:
            print(f"data: {_many(copies[name], 'document', name)} not trained on: the text is held out", flush=True)
    return about


def _many(count: int, what: str, source: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)} of {source} {'are' if count > 1 else 'is'}"


def sweep(folder: Path, sources: dict[str, Any]) -> None:
    """Remove whatever is in FOLDER/NAME of each source but not in the index: what is only of use to a restart."""
    for name, about in sources.items():
        _keep(
            files.inside(folder, name, str(folder)),
            {file for side in SIDES if side in about for file in about[side]["files"]},
        )


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds the ids."""
    return np.dtype(np.uint16 if tokenizer.num_ids <= 2**16 else np.uint32)


def no_documents(name: str, what: str, data: DataSection) -> UserError:
    """A source of which nothing can be trained, or nothing be held out."""
    key = f"data.sources.{name}" if data.sources else "data"
    return UserError(Problem(f"the source {name!r} has no {what}", "none", "at least one", key))


def _parts(
    source: MixedSource, listing: Listing, fingerprint: dict[str, Any], tokenizer: Tokenizer, folder: Path
) -> list[Part]:
    """The shards in groups of PART_BYTES or a little more, the training side's first."""
    about = fingerprint["sources"][source.name]
    settings = {key: value for key, value in about.items() if not isinstance(value, dict)}
    own = fingerprints.holds_out_by_itself(source)
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
                made.append(Part(source, len(made), tuple(group), size, side, folder, made_of))
                group, size = [], 0
    return made


def _whole(part: Part, itemsize: int) -> dict[str, Any] | None:
    """The record of a part that is done, made of the same, and as it was written; its ids take `itemsize` bytes."""
    try:
        tree = json.loads(files.read_text(part.record_file))
        record = index.record_of(tree, part.number, itemsize)
        if record is None or record["made_of"] != part.made_of:
            return None
        whole = all(files.sha256(part.folder / name) == made["sha256"] for name, made in _files(record).items())
    except (OSError, ValueError, RecursionError):
        return None
    return record if whole else None


def _files(record: dict[str, Any]) -> dict[str, Any]:
    return {name: made for side in SIDES for name, made in record[side]["files"].items()}


def _bad(records: Any) -> list[Bad]:
    return [Bad(**bad) for record in records for bad in record["bad"]]


def _keep(folder: Path, names: set[str]) -> None:
    """Remove every other file of a folder."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in names:
            path.unlink()


def _run(work: Work, todo: list[int], folder: Path) -> None:
    """Make these parts, on as many processes as there are cores and large parts for."""
    num_large = math.ceil(sum(work.parts[number].size for number in todo) / PART_BYTES)
    num_processes = min(len(todo), num_large, pool.num_cores())
    if num_processes > 1:
        saved = folder / "tokenizer.partial"
        work.tokenizer.save(saved)
        try:
            with telling(work.state, work.health):
                pool.run(work, todo, num_processes, saved)
        finally:
            shutil.rmtree(saved)
            for part in work.parts:  # of a process that was stopped
                for path in part.folder.glob("*.partial"):
                    path.unlink()
    else:
        with telling(work.state, work.health):
            for number in todo:
                work.tokenise(number)


def _joined(
    source: MixedSource, data: DataSection, records: Sequence[dict[str, Any]], folder: Path, dtype: np.dtype
) -> dict[str, Any]:
    """What the index says of one source, and how its validation side was held out."""
    num = {side: sum(record[side]["documents"] for record in records) for side in SIDES}
    if not any(num.values()):
        raise no_documents(source.name, "document", data)
    about: dict[str, Any] = {
        "bad_records": sum(len(record["bad"]) for record in records),
        "empty_records": sum(record.get("empty", 0) for record in records),
    }
    if all(num.values()):
        option = "validation_split" if source.validation_split else "validation_path"
        about["held_out"] = option if fingerprints.holds_out_by_itself(source) else "documents"
        return about | {side: tokens.joined(folder, side, [r[side] for r in records], dtype) for side in SIDES}
    (only,) = (side for side in SIDES if num[side])
    if fingerprints.holds_out_by_itself(source):
        raise no_documents(source.name, "document to validate on" if only == "train" else "document to train on", data)
    parts = [_renamed(record[only], folder, only) for record in records]
    whole = tokens.joined(folder, "whole", parts, dtype)
    cut = whole["tokens"] - math.ceil(whole["tokens"] * data.validation_share)
    ends = np.append(np.fromfile(folder / "whole.starts", np.uint64)[1:], np.uint64(whole["tokens"]))
    num_train = int((ends <= cut).sum())  # documents that end before the cut
    train = {"tokens": cut, "documents": num_train}
    validation = {"tokens": whole["tokens"] - cut, "documents": whole["documents"] - num_train, "first": cut}
    return about | {"held_out": "tail", "train": whole | train, "validation": whole | validation}


def _renamed(made: dict[str, Any], folder: Path, side: str) -> dict[str, Any]:
    """A part of a side's files, called whole-* as they hold both sides; a restart would make the part anew."""
    names = {name: name.replace(side, "whole", 1) for name in made["files"]}
    for name, new in names.items():
        with contextlib.suppress(FileNotFoundError):
            (folder / name).rename(folder / new)
    return made | {"files": {names[name]: about for name, about in made["files"].items()}}
