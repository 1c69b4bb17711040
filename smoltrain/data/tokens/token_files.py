"""Token ids in files: NAME-00000.bin, NAME-00001.bin, ... are one stream; NAME.starts and its like tell its documents.

All of them are bare arrays in native (little-endian) order, mapped into memory and never loaded whole: ids uint16 or
uint32, all others uint64. A file in the making is called .partial; its final name means that it is whole and on the
disk.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from smoltrain import files
from smoltrain.data.documents.records import Document
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokenizers.encode_pieces import TokenPiece
from smoltrain.data.tokenizers.round_trip import RoundTripCounter, RoundTripCounts
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.index import (
    ADDRESSES,
    FILE_KINDS,
    HASHES,
    IDS,
    STARTS,
    IndexFile,
    IndexRoundTrip,
    IndexSide,
    PartSide,
)
from smoltrain.errors import Problem, UserError

SHARD_BIT = 40  # of a packed address: from here on the shard's number, below it the record's (from 1)


def content_hash(text: str) -> int:
    """xxh3-64 of the UTF-8, in [0, 2^64): equal texts have equal hashes, and collisions are negligible."""
    return xxhash.xxh3_64_intdigest(text.encode())


def pack_address(number: int, shard: Shard, document: Document) -> int:
    """Where a document lies, as a uint64: in which record of shard `number`; record 0 is all of a shard."""
    record = 0 if document.name == shard.name else document.record + 1
    return number << SHARD_BIT | record


class MappedTokens:
    """N token ids in one stream over one or more arrays, and its D documents.

    `starts` (D,) uint64, ascending, are the places at which documents begin, the first of them 0; `hashes` (D,) uint64
    are their content hashes. `addresses` (D,) uint64 are their packed addresses, () where these are not known, as of
    data that older versions prepared; `shard_names` are the names of the shards by number.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        starts: np.ndarray,
        hashes: np.ndarray,
        addresses: np.ndarray | None = None,
        shard_names: Sequence[str] = (),
    ) -> None:
        assert parts, "a stream of no part has no dtype"
        assert len(starts) == len(hashes)
        self._parts = [np.asarray(part) for part in parts]  # of a memmap still a view, but four times as fast to index
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._begins = self._ends - [len(part) for part in parts]
        self.starts, self.hashes = np.asarray(starts), np.asarray(hashes)
        self.addresses = np.empty(0, np.uint64) if addresses is None else np.asarray(addresses)
        self.shard_names = shard_names

    @classmethod
    def open(cls, folder: Path, side: IndexSide, shard_names: Sequence[str] = ()) -> "MappedTokens":
        """One side of a source, as its index says: `side` is what join_token_parts returned.

        Errors: UserError if a file is missing or has not the size that it had; what is in it was checked before
        (check_tokens.py).
        """
        for name, made in side.files.items():
            path = files.resolve_inside(folder.parent, f"{folder.name}/{name}", str(folder.parent))
            want = f"{made.bytes:,} bytes"
            if not path.is_file():
                raise UserError(Problem(f"{name} is missing", "no such file", f"{want}, as prepared", str(folder)))
            saw = path.stat().st_size
            if saw != made.bytes:
                raise UserError(Problem(f"{name} is damaged", f"{saw:,} bytes", want, str(folder)))
        parts = [_map_array(folder / name, side.dtype) for name in side.file_names(IDS)]
        of_documents = {
            kind: [_map_array(folder / name, "uint64") for name in side.file_names(kind)]
            for kind in (STARTS, HASHES, ADDRESSES)
        }
        (starts,) = of_documents[STARTS]
        (hashes,) = of_documents[HASHES]
        whole = cls(parts, starts, hashes, *of_documents[ADDRESSES], shard_names=shard_names)
        return whole._slice(side.first, side.first + side.tokens)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def dtype(self) -> np.dtype:
        """uint16 or uint32."""
        return self._parts[0].dtype

    def document_address(self, number: int) -> str:
        """SHARD, or SHARD:N (from 1) where it has many documents, of document `number`; '' if it is not known."""
        if number >= len(self.addresses):
            return ""
        shard, record = divmod(int(self.addresses[number]), 1 << SHARD_BIT)
        if shard >= len(self.shard_names):
            return ""
        name = self.shard_names[shard]
        return f"{name}:{record}" if record else name

    def read_rows(self, offsets: np.ndarray, length: int) -> np.ndarray:
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

    def iterate_views(self, length: int) -> Iterator[np.ndarray]:
        """All ids in order, as views of at most `length` of them."""
        for part in self._parts:
            for start in range(0, len(part), length):
                yield part[start : start + length]

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
        begin, end = np.searchsorted(self.starts, np.array([first, last], self.starts.dtype)).tolist()
        if begin == end or self.starts[begin] != first:
            begin -= 1  # the document that is cut
        starts = np.maximum(self.starts[begin:end], np.uint64(first)) - np.uint64(first)
        return MappedTokens(
            self._views_between(first, last), starts, self.hashes[begin:end], self.addresses[begin:end],
            self.shard_names,
        )  # fmt: skip


class TokenWriter:
    """The tokens and documents of one side of one part, NAME.bin, NAME.starts and so on, in the making."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer | None = None) -> None:
        """With a tokenizer it also counts how much of the text comes back from the ids."""
        self.num_tokens = self.num_documents = 0
        self._counter = None if tokenizer is None else RoundTripCounter(tokenizer)
        self._files = {kind: _PartialFile(folder / f"{name}{kind}") for kind in FILE_KINDS}

    def begin_document(self, hashed: int, address: int | None = None) -> None:
        """A document of this content hash begins with the next ids. Either all documents have addresses or none."""
        self._files[STARTS].write(np.uint64(self.num_tokens))
        self._files[HASHES].write(np.uint64(hashed))
        if address is not None:
            self._files[ADDRESSES].write(np.uint64(address))
        self.num_documents += 1

    def add_piece(self, piece: TokenPiece[Any]) -> None:
        """The next ids, and the text that they were made of."""
        self.add_ids(piece.ids)
        if self._counter is not None:
            self._counter.add(piece)

    def add_ids(self, ids: np.ndarray) -> None:
        """The next ids (n,)."""
        self._files[IDS].write(ids)
        self.num_tokens += len(ids)

    def commit(self) -> PartSide:
        """Give their names to the files that hold something."""
        written = {}
        for file in self._files.values():
            if file.size:
                written |= file.commit()
        self.discard()
        side = PartSide(tokens=self.num_tokens, documents=self.num_documents, files=written)
        if self._counter is not None:
            side.spelling = _to_index(self._counter.found)
        return side

    def discard(self) -> None:
        """Close and remove whatever is not committed."""
        for file in self._files.values():
            file.discard()


def join_token_parts(folder: Path, name: str, parts: Iterable[PartSide], dtype: np.dtype) -> IndexSide:
    """One stream of several parts, with all of its documents in NAME.starts and its like.

    `parts` are what TokenWriter.commit returned, in the order of the stream; those without tokens are no part of it.
    """
    parts = [part for part in parts if part.tokens]
    of_documents = {kind: _PartialFile(folder / f"{name}{kind}") for kind in (STARTS, HASHES, ADDRESSES)}
    written: dict[str, IndexFile] = {}
    num_tokens = 0
    for part in parts:
        written |= {ids: part.files[ids] for ids in part.file_names(IDS)}
        for kind, file in of_documents.items():
            for source in part.file_names(kind):
                values = np.fromfile(folder / source, np.uint64)
                file.write(values + np.uint64(num_tokens) if kind == STARTS else values)
        num_tokens += part.tokens
    for file in of_documents.values():
        written |= file.commit() if file.size else {}
        file.discard()
    num_documents = sum(part.documents for part in parts)
    about = {"tokens": num_tokens, "documents": num_documents, "dtype": dtype.name, "first": 0, "files": written}
    joined = IndexSide.model_validate(about)
    if all(part.spelling for part in parts):
        joined.spelling = _to_index(sum_round_trips(parts))
    return joined


def sum_round_trips(sides: Iterable[PartSide]) -> RoundTripCounts:
    """Those of several sides or parts; one of which they are not known counts as nothing."""
    known = (side.spelling for side in sides if side.spelling is not None)
    return sum((RoundTripCounts(**spelling.model_dump()) for spelling in known), RoundTripCounts())


def _to_index(counts: RoundTripCounts) -> IndexRoundTrip:
    return IndexRoundTrip(**asdict(counts))


class _PartialFile:
    """A file in the making, and the SHA-256 of what is in it so far."""

    def __init__(self, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        self._final = final
        self._partial = final.with_name(f"{final.name}.partial")
        self._partial.unlink(missing_ok=True)  # it may be a link: what it leads to is not ours
        self._file = self._partial.open("xb")
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, array: np.ndarray | np.generic) -> None:
        raw = array.tobytes()
        with files.name_file(self._final):
            self._file.write(raw)
        self._sha256.update(raw)
        self.size += len(raw)

    def commit(self) -> dict[str, IndexFile]:
        with files.name_file(self._final):
            self._file.close()  # which writes what is buffered
            files.commit_file(self._partial, self._final)
        return {self._final.name: IndexFile(bytes=self.size, sha256=self._sha256.hexdigest())}

    def discard(self) -> None:
        with files.name_file(self._final):
            self._file.close()
        self._partial.unlink(missing_ok=True)


def _map_array(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, np.dtype(dtype), mode="r") if path.stat().st_size else np.empty(0, np.dtype(dtype))


def _view_windows(part: np.ndarray, length: int) -> np.ndarray:
    """Every `length` consecutive ids of a part, as a view (n, length); indexing it copies whole rows at once."""
    return np.lib.stride_tricks.as_strided(
        part, (len(part) - length + 1, length), (part.itemsize, part.itemsize), writeable=False
    )
