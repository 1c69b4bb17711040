"""Token ids in files: NAME-00000.bin, NAME-00001.bin, ... are one stream, NAME.starts and NAME.hashes its documents.

All of them are bare little-endian arrays, mapped into memory and never loaded whole: ids uint16 or uint32, starts and
hashes uint64. A file in the making is called .partial; its final name means that it is whole and on the disk.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from smoltrain import files
from smoltrain.data.tokenizers.round_trip import round_trip_to_json, sum_round_trips
from smoltrain.errors import Problem, UserError

SIDES = ("train", "validation")
TOKEN_FILE_SUFFIXES = (".bin", ".starts", ".hashes")


def content_hash(text: str) -> int:
    """Equal for equal texts, and for other texts other: xxh3 of the UTF-8, in [0, 2^64)."""
    return xxhash.xxh3_64_intdigest(text.encode())


class MappedTokens:
    """N token ids in one stream over one or more arrays, and its D documents.

    `starts` (D,) uint64, ascending, are the places at which documents begin, the first of them 0; `hashes` (D,) uint64
    are the content hashes of these documents.
    """

    def __init__(self, parts: Sequence[np.ndarray], starts: np.ndarray, hashes: np.ndarray) -> None:
        assert parts, "a stream of no part has no dtype"
        assert len(starts) == len(hashes)
        self._parts = [np.asarray(part) for part in parts]  # of a memmap still a view, but four times as fast to index
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._begins = self._ends - [len(part) for part in parts]
        self.starts, self.hashes = np.asarray(starts), np.asarray(hashes)

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any]) -> "MappedTokens":
        """One side of a source, as its index says: `about` is what `joined` returned.

        Errors: UserError if a file has not the size that it had; what is in it was looked at before (damage.py).
        """
        for name, made in about["files"].items():
            path = files.resolve_inside(folder.parent, f"{folder.name}/{name}", str(folder.parent))
            saw = path.stat().st_size if path.is_file() else 0
            if saw != made["bytes"]:
                want = f"{made['bytes']:,} bytes"
                raise UserError(Problem(f"{name} is damaged", f"{saw:,} bytes", want, str(folder)))
        kinds = {
            kind: [folder / name for name in about["files"] if name.endswith(kind)] for kind in TOKEN_FILE_SUFFIXES
        }
        parts = [_map_array(path, about["dtype"]) for path in kinds[".bin"]]
        (starts,), (hashes,) = (
            [_map_array(path, "uint64") for path in kinds[kind]] for kind in TOKEN_FILE_SUFFIXES[1:]
        )
        whole = cls(parts, starts, hashes)
        return whole._slice(about["first"], about["first"] + about["tokens"])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def dtype(self) -> np.dtype:
        """uint16 or uint32."""
        return self._parts[0].dtype

    def rows(self, offsets: np.ndarray, length: int) -> np.ndarray:
        """The ids (n, length) from each of the offsets (n,) on, copied; offset + length is at most N."""
        offsets = np.asarray(offsets, np.int64)
        if not len(offsets):
            return np.empty((0, length), self.dtype)
        assert offsets.min() >= 0
        assert offsets.max() <= len(self) - length
        if len(self._parts) == 1:
            return _view_windows(self._parts[0], length)[offsets]
        numbers = np.searchsorted(self._ends, offsets, side="right")  # the part of each row's first token
        starts = offsets - self._begins[numbers]
        pieces = []
        for number, start in zip(numbers.tolist(), starts.tolist(), strict=True):
            piece = self._parts[number][start : start + length]
            pieces.append(piece)
            if len(piece) < length:
                at = self._begins[number] + start
                pieces += self._views_between(at + len(piece), at + length)
        return np.concatenate(pieces).reshape(len(offsets), length)

    def all(self) -> np.ndarray:
        """All ids (N,), copied into memory."""
        return np.concatenate(self._parts)

    def _views_between(self, first: int, last: int) -> list[np.ndarray]:
        """The ids from `first` up to, but without, `last`, as one view into each part."""
        spans = zip(self._parts, np.maximum(first - self._begins, 0), np.maximum(last - self._begins, 0), strict=True)
        return [piece for part, start, stop in spans if len(piece := part[start:stop])]

    def _slice(self, first: int, last: int) -> "MappedTokens":
        """The stream from token `first` up to, but without, `last`; a document cut in two begins anew at its cut."""
        if (first, last) == (0, len(self)):
            return self
        begin, end = np.searchsorted(self.starts, [first, last])
        starts, hashes = self.starts[begin:end] - np.uint64(first), self.hashes[begin:end]
        if not len(starts) or starts[0]:
            starts, hashes = np.append(np.uint64(0), starts), np.append(self.hashes[begin - 1], hashes)
        return MappedTokens(self._views_between(first, last), starts, hashes)


class TokenWriter:
    """The tokens and documents of one side of one part, NAME.bin, NAME.starts and NAME.hashes, in the making."""

    def __init__(self, folder: Path, name: str) -> None:
        self.num_tokens = self.num_documents = 0
        self._files = [_PartialFile(folder / f"{name}{kind}") for kind in TOKEN_FILE_SUFFIXES]

    def begin(self, hashed: int) -> None:
        """A document of this content hash begins with the next ids."""
        _, starts, hashes = self._files
        starts.write(np.uint64(self.num_tokens))
        hashes.write(np.uint64(hashed))
        self.num_documents += 1

    def add(self, ids: np.ndarray) -> None:
        """The next ids (n,)."""
        self._files[0].write(ids)
        self.num_tokens += len(ids)

    def commit(self) -> dict[str, Any]:
        """Give the files their names, if there is anything in them; returns what an index says of this part."""
        about = {name: made for file in self._files for name, made in file.commit().items()} if self.num_tokens else {}
        self.discard()
        return {"tokens": self.num_tokens, "documents": self.num_documents, "files": about}

    def discard(self) -> None:
        """Close and remove whatever is not committed."""
        for file in self._files:
            file.discard()


def join_token_parts(folder: Path, name: str, parts: Iterable[dict[str, Any]], dtype: np.dtype) -> dict[str, Any]:
    """One stream of several parts, with all documents in NAME.starts and NAME.hashes; returns what an index says of it.

    `parts` are what `Writer.commit` returned, in the order of the stream; those without tokens are no part of it.
    """
    parts = [part for part in parts if part["tokens"]]
    starts, hashes = (_PartialFile(folder / f"{name}{kind}") for kind in TOKEN_FILE_SUFFIXES[1:])
    found, first = {}, 0
    for part in parts:
        ids, *documents = part["files"]
        found[ids] = part["files"][ids]
        starts.write(np.fromfile(folder / documents[0], np.uint64) + np.uint64(first))
        hashes.write(np.fromfile(folder / documents[1], np.uint64))
        first += part["tokens"]
    found |= starts.commit() | hashes.commit()
    num_documents = sum(part["documents"] for part in parts)
    counted = (
        {"spelling": round_trip_to_json(sum_round_trips(parts))} if all("spelling" in part for part in parts) else {}
    )
    return {"tokens": first, "documents": num_documents, "dtype": dtype.name, "first": 0, "files": found} | counted


class _PartialFile:
    """A file in the making, and the SHA-256 of what is in it so far."""

    def __init__(self, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial_path(final).unlink(missing_ok=True)  # it may be a link: what it leads to is not ours
        self._final, self._file, self._sha256 = final, partial_path(final).open("xb"), hashlib.sha256()

    def write(self, array: np.ndarray | np.generic) -> None:
        raw = array.tobytes()
        self._file.write(raw)
        self._sha256.update(raw)

    def commit(self) -> dict[str, Any]:
        size = self._file.tell()
        self._file.close()
        commit_partial(self._final)
        return {self._final.name: {"bytes": size, "sha256": self._sha256.hexdigest()}}

    def discard(self) -> None:
        self._file.close()
        partial_path(self._final).unlink(missing_ok=True)


def partial_path(final: Path) -> Path:
    """What a file is called while it is in the making."""
    return final.with_name(f"{final.name}.partial")


def write_partial_json(path: Path, value: Any) -> None:
    """Replace a whole file so that a reader, or a crash, sees either the old or the new one."""
    partial_path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    commit_partial(path)


def commit_partial(final: Path) -> None:
    """Give a partial file its final name; see files.commit."""
    files.commit_file(partial_path(final), final)


def _map_array(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, np.dtype(dtype), mode="r") if path.stat().st_size else np.empty(0, np.dtype(dtype))


def _view_windows(part: np.ndarray, length: int) -> np.ndarray:
    """Every `length` consecutive ids of a part, as a view (n, length); indexing it copies whole rows at once."""
    return np.lib.stride_tricks.as_strided(
        part, (len(part) - length + 1, length), (part.itemsize, part.itemsize), writeable=False
    )
