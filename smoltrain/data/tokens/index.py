"""index.json: what the tokens of a run were made of and what their files are. It may be damaged, or a stranger's.

It is written last, sealed with its own digest, so that it exists only beside whole files. Nothing that it says is
believed before it was checked: types, names that would lead out of its folder, sizes that contradict each other.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from smoltrain import files
from smoltrain.errors import Problem, UserError, format_value

INDEX_FORMAT = 3  # 2 differs in that it has no addresses of documents, and can still be read
INDEX_DIGEST_KEY = "index_sha256"  # in index.json, and in a part's record: of everything else in it
MAX_COUNT = 2**53  # more than any count is
WHAT_WAS_PREPARED = "what was prepared (delete the folder to prepare anew)"

SIDES = ("train", "validation")
IDS, STARTS, HASHES, ADDRESSES = FILE_KINDS = (".bin", ".starts", ".hashes", ".addresses")

IndexCount = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SourceName = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*$")]  # as schema.MixedSource has it
NAME_OF_FILE = r"^(train|validation|whole)(-[0-9]{5,}(-apart)?)?\.(bin|starts|hashes|addresses)$"
HeldOutRule = Literal["documents", "tail", "validation_path", "validation_split"]
FileName = Annotated[str, StringConstraints(pattern=NAME_OF_FILE)]


class _StrictModel(BaseModel):
    """Strict: no text is taken for a number. Keys of later versions may stand beside those that are known."""

    model_config = ConfigDict(strict=True, extra="allow")

    def to_json(self) -> dict[str, Any]:
        """What was read, or is to be written: defaults that nobody set are no part of it."""
        return self.model_dump(mode="json", exclude_unset=True)


class IndexFile(_StrictModel):
    """A file as it was written."""

    bytes: IndexCount
    sha256: Sha256


class IndexRoundTrip(_StrictModel):
    """The fields of RoundTripCounts."""

    tokens: IndexCount
    unspelled: Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
    sampled: IndexCount
    lost: IndexCount


class PartSide(_StrictModel):
    """What TokenWriter.commit returns: one side of one part."""

    tokens: IndexCount
    documents: IndexCount
    files: dict[FileName, IndexFile]
    spelling: IndexRoundTrip | None = None  # not known of a part that has lost documents since, and of old data

    def file_names(self, kind: str) -> list[str]:
        """The files of one of FILE_KINDS, in the order of the stream."""
        return [name for name in self.files if name.endswith(kind)]


class IndexSide(PartSide):
    """What join_token_parts returns: one stream, or a stretch of one."""

    dtype: Literal["uint16", "uint32"]
    first: IndexCount  # token at which the stretch begins


class IndexSource(_StrictModel):
    """Of one source. In cached mode it has both sides, in stream mode one and the shards of the other."""

    bad_records: IndexCount
    empty_records: IndexCount = 0
    copies: IndexCount = 0  # documents not trained on, as their texts are held out
    repeated: IndexCount = 0  # documents trained on whose texts other ones have too
    held_out: HeldOutRule
    train: IndexSide | None = None
    validation: IndexSide
    shards: list[Annotated[tuple[str, str, IndexCount | None, str], Field(strict=False)]] | None = None
    shard_names: list[str] | None = None  # in cached mode: the addresses of documents speak of their numbers

    @property
    def sides(self) -> list[IndexSide]:
        """Those that it has."""
        return [side for side in (self.train, self.validation) if side is not None]


class IndexFingerprint(_StrictModel):
    """What make_fingerprint returns."""

    sources: dict[SourceName, dict[str, JsonValue]]
    tokenizer: dict[str, JsonValue]
    separator: str
    pad: str | None


class DataIndex(_StrictModel):
    """All that is known of prepared data."""

    format: Literal[2, 3]
    mode: Literal["cached", "stream"]
    why: str
    fingerprint: IndexFingerprint
    tokenizer_sha256: Sha256
    tokenizer_files: dict[str, IndexFile] | None = None
    separator_id: IndexCount
    dtype: Literal["uint16", "uint32"]
    streams: Annotated[int, Field(ge=1, le=2**24)]
    sources: Annotated[dict[SourceName, IndexSource], Field(min_length=1)]
    cache: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")] | None = None
    changes: list[dict[str, str]] = []
    not_read: dict[str, IndexCount] = {}


class PartRecord(_StrictModel):
    """What part-00000.json says of a part that is whole (token_parts.py)."""

    made_of: Sha256
    train: PartSide
    validation: PartSide
    bad: list[dict[Literal["source", "place", "why"], str]]
    empty: IndexCount

    @property
    def sides(self) -> dict[str, PartSide]:
        """By their names."""
        return {"train": self.train, "validation": self.validation}

    @property
    def files(self) -> dict[str, IndexFile]:
        """Of both sides."""
        return self.train.files | self.validation.files


def data_index_file(home: Path) -> Path:
    """Where the index of a run, or of a cache, is."""
    return home / "data" / "index.json"


def read_data_index(file: Path) -> DataIndex:
    """An index, checked. Errors: UserError if there is none, if it is of another version, or damaged in any way."""
    if not os.path.lexists(file):
        raise UserError(Problem("the data are not prepared", f"no {file}", "`prepare` to run first", "run.name"))
    try:
        tree = json.loads(files.read_text_file(file))
        form = tree["format"]
    except OSError as error:
        raise _damaged_index_error(file, files.describe_error(error)) from None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise _damaged_index_error(file, f"{type(error).__name__}: {error}") from None
    if isinstance(form, int) and form not in (INDEX_FORMAT - 1, INDEX_FORMAT):
        what, want = "the data were prepared by another version of smoltrain", f"format {INDEX_FORMAT}"
        change = f"{file.parent}: delete it to prepare anew, or run.name"
        raise UserError(Problem(what, f"format {form}", want, change))
    try:
        index = DataIndex.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged_index_error(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    contradiction = _find_contradiction(index)
    if contradiction:
        raise _damaged_index_error(file, contradiction)
    is_sealed = INDEX_DIGEST_KEY in tree or index.tokenizer_files is not None  # older ones are not
    if is_sealed and tree != files.seal_json(tree, INDEX_DIGEST_KEY):
        raise _damaged_index_error(file, "another digest than that of its content")
    return index


def write_data_index(file: Path, tree: dict[str, Any]) -> None:
    """Replace the index by `tree`, sealed; a reader, or a crash, sees either the old or the new one."""
    files.write_json_file(file, files.seal_json(tree, INDEX_DIGEST_KEY))


def check_part_record(tree: Any, number: int, itemsize: int) -> PartRecord | None:
    """The record of the part with this number, if it is as it was written; its ids take `itemsize` bytes each."""
    try:
        record = PartRecord.model_validate(tree)
    except ValidationError:
        return None
    if tree != files.seal_json(tree, INDEX_DIGEST_KEY):
        return None
    for name, side in record.sides.items():
        sizes = {IDS: side.tokens * itemsize} | dict.fromkeys((STARTS, HASHES, ADDRESSES), side.documents * 8)
        want = {f"{name}-{number:05}{kind}": size for kind, size in sizes.items()} if side.tokens else {}
        if {file: made.bytes for file, made in side.files.items()} != want:
            return None
    return record


def _find_contradiction(index: DataIndex) -> str | None:
    """The first thing in which an index cannot be true."""
    is_cached = index.mode == "cached"
    for name, source in index.sources.items():
        if is_cached != (source.train is not None) or is_cached == (source.shards is not None):
            return f"{name} is not what the mode {index.mode} has"
        cut = source.train.tokens if source.held_out == "tail" and source.train else None
        for side in source.sides:
            fault = _find_side_fault(side, index.dtype, cut)
            if fault:
                return f"{name}: {fault}"
    if is_cached and index.streams != 1:
        return f"{index.streams} streams in cached mode"
    if index.sources.keys() != index.fingerprint.sources.keys():
        return "other sources than in its fingerprint"
    return None


def _find_side_fault(side: IndexSide, dtype: str, cut: int | None) -> str | None:
    """What is wrong with one side; `cut` is where the tail begins, of a stream that both sides share."""
    if side.dtype != dtype:
        return f"dtype {side.dtype} instead of {dtype}"
    itemsize = np.dtype(dtype).itemsize
    sizes = {kind: [side.files[name].bytes for name in side.file_names(kind)] for kind in FILE_KINDS}
    is_stream = bool(sizes[IDS]) and all(size % itemsize == 0 for size in sizes[IDS])
    # A format of before has no addresses; nor has the validation side of a stream, which nobody asks for them.
    fits_documents = len(sizes[STARTS]) == 1 and sizes[HASHES] == sizes[STARTS]
    if not is_stream or not fits_documents or sizes[ADDRESSES] not in ([], sizes[STARTS]):
        return f"files that make no stream: {format_value(list(side.files))}"
    total, num_documents = sum(sizes[IDS]) // itemsize, sizes[STARTS][0] // 8
    stretches = [(0, total)] if cut is None else [(0, cut), (cut, total - cut)]
    if (side.first, side.tokens) not in stretches or not side.tokens or side.documents > num_documents:
        return f"{side.tokens} tokens of {side.documents} documents, which its files do not hold"
    return None


def _damaged_index_error(file: Path, saw: str) -> UserError:
    return UserError(Problem("the index of the data is damaged", " ".join(saw.split()), WHAT_WAS_PREPARED, str(file)))
