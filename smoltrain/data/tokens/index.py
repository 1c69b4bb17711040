"""index.json: what the tokens of a run were made of and what their files are. It may be damaged, or a stranger's.

It is written last, sealed with its own digest, so that it exists only beside whole files. Nothing that it says is
believed before it was checked: types, names that would lead out of its folder, sizes that contradict each other.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from smoltrain import files
from smoltrain.data.tokens.token_files import TOKEN_FILE_SUFFIXES, write_partial_json
from smoltrain.errors import Problem, UserError, format_value

INDEX_FORMAT = 2
INDEX_DIGEST_KEY = "index_sha256"  # in index.json, and in a part's record: of everything else in it
MAX_COUNT = 2**53  # more than any count is

IndexCount = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SourceName = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*$")]  # as schema.MixedSource has it
NAME_OF_FILE = r"^(train|validation|whole)(-[0-9]{5,}(-apart)?)?\.(bin|starts|hashes)$"
FileName = Annotated[str, StringConstraints(pattern=NAME_OF_FILE)]


class _StrictModel(BaseModel):
    """Strict: no text is taken for a number. Keys of later versions may stand beside those that are known."""

    model_config = ConfigDict(strict=True, extra="allow")


class IndexFile(_StrictModel):
    """As `tokens.Writer` wrote it."""

    bytes: IndexCount
    sha256: Sha256


class IndexRoundTrip(_StrictModel):
    """What spelling.to_json returned; of what was made before it was counted there is none."""

    tokens: IndexCount
    unspelled: Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
    sampled: IndexCount
    lost: IndexCount


class IndexSide(_StrictModel):
    """What `tokens.joined` returned: one stream, or a stretch of one."""

    tokens: IndexCount
    documents: IndexCount
    dtype: Literal["uint16", "uint32"]
    first: IndexCount
    files: dict[FileName, IndexFile]
    spelling: IndexRoundTrip = IndexRoundTrip(tokens=0, unspelled=0, sampled=0, lost=0)


class IndexSource(_StrictModel):
    """Of one source. In cached mode it has both sides, in stream mode one and the shards of the other."""

    bad_records: IndexCount
    empty_records: IndexCount = 0
    copies: IndexCount = 0
    held_out: Literal["documents", "tail", "validation_path", "validation_split"]
    train: IndexSide | None = None
    validation: IndexSide
    shards: list[Annotated[tuple[str, str, IndexCount | None, str], Field(strict=False)]] | None = None


class IndexFingerprint(_StrictModel):
    """What fingerprints.make returned."""

    sources: dict[SourceName, dict[str, JsonValue]]
    tokenizer: dict[str, JsonValue]
    separator: str
    pad: str | None


class DataIndex(_StrictModel):
    """The whole."""

    format: Literal[2]
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
    """What part-00000.json says of a part that is whole (cached.py)."""

    made_of: Sha256
    train: "PartSide"
    validation: "PartSide"
    bad: list[dict[Literal["source", "place", "why"], str]]
    empty: IndexCount


class PartSide(_StrictModel):
    """What `tokens.Writer.commit` returned."""

    tokens: IndexCount
    documents: IndexCount
    files: dict[FileName, IndexFile]
    spelling: IndexRoundTrip


def data_index_file(home: Path) -> Path:
    """Where the index of a run, or of a cache, is."""
    return home / "data" / "index.json"


def read_data_index(file: Path) -> dict[str, Any]:
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
    if isinstance(form, int) and form != INDEX_FORMAT:
        what, want = "the data were prepared by another version of smoltrain", f"format {INDEX_FORMAT}"
        change = f"{file.parent}: delete it to prepare anew, or run.name"
        raise UserError(Problem(what, f"format {form}", want, change))
    try:
        checked = DataIndex.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged_index_error(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if wrong := _find_contradiction(checked):
        raise _damaged_index_error(file, wrong)
    if (INDEX_DIGEST_KEY in tree or checked.tokenizer_files is not None) and tree.get(INDEX_DIGEST_KEY) != digest_index(
        tree
    ):
        raise _damaged_index_error(file, "another digest than that of its content")
    return tree


def write_data_index(file: Path, tree: dict[str, Any]) -> None:
    """Replace the index by `tree`, sealed; a reader, or a crash, sees either the old or the new one."""
    write_partial_json(file, tree | {INDEX_DIGEST_KEY: digest_index(tree)})


def digest_index(tree: dict[str, Any]) -> str:
    """SHA-256 (hex) of an index without its digest."""
    rest = {key: value for key, value in tree.items() if key != INDEX_DIGEST_KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_part_record(tree: Any, number: int, itemsize: int) -> dict[str, Any] | None:
    """The record of the part with this number, if it is as it was written; its ids take `itemsize` bytes each."""
    try:
        record = PartRecord.model_validate(tree)
    except ValidationError:
        return None
    if tree.get(INDEX_DIGEST_KEY) != digest_index(tree):
        return None
    for side in ("train", "validation"):
        made: PartSide = getattr(record, side)
        sizes = (made.tokens * itemsize, made.documents * 8, made.documents * 8) if made.tokens else ()
        want = {f"{side}-{number:05}{kind}": size for kind, size in zip(TOKEN_FILE_SUFFIXES, sizes, strict=False)}
        if {name: file.bytes for name, file in made.files.items()} != want:
            return None
    return tree


def _find_contradiction(index: DataIndex) -> str:
    """The first thing in which an index cannot be true; '' if there is none."""
    cached = index.mode == "cached"
    for name, about in index.sources.items():
        if cached != (about.train is not None) or cached == (about.shards is not None):
            return f"{name} is not what the mode {index.mode} has"
        cut = about.train.tokens if about.held_out == "tail" and about.train else None
        for side in (about.train, about.validation):
            if side and (wrong := _find_side_fault(side, index.dtype, cut)):
                return f"{name}: {wrong}"
    if cached and index.streams != 1:
        return f"{index.streams} streams in cached mode"
    return "" if index.sources.keys() == index.fingerprint.sources.keys() else "other sources than in its fingerprint"


def _find_side_fault(side: IndexSide, dtype: str, cut: int | None) -> str:
    """What is wrong with one side; `cut` is where the tail begins, of a stream that both sides share."""
    sizes = {kind: [f.bytes for name, f in side.files.items() if name.endswith(kind)] for kind in TOKEN_FILE_SUFFIXES}
    ids, (starts, hashes) = sizes[".bin"], (sizes[kind] for kind in TOKEN_FILE_SUFFIXES[1:])
    itemsize = np.dtype(dtype).itemsize
    if side.dtype != dtype:
        return f"dtype {side.dtype} instead of {dtype}"
    if not ids or len(starts) != 1 or starts != hashes or any(size % itemsize for size in ids):
        return f"files that make no stream: {format_value(list(side.files))}"
    total, num_documents = sum(ids) // itemsize, starts[0] // 8
    stretches = [(0, total)] if cut is None else [(0, cut), (cut, total - cut)]
    if (side.first, side.tokens) not in stretches or not side.tokens or side.documents > num_documents:
        return f"{side.tokens} tokens of {side.documents} documents, which its files do not hold"
    return ""


def _damaged_index_error(file: Path, saw: str) -> UserError:
    want = "what was prepared (delete the folder to prepare anew)"
    return UserError(Problem("the index of the data is damaged", " ".join(saw.split()), want, str(file)))
