"""No text is trained on and validated on, whatever its documents are called: cached tokens, compared by content.

Documents are held out by their names, by files of their own, or as the last tokens of a source. Equal texts under
several names can so fall on both sides; then those of the training side are left out. The parts stay as they are, for
a restart; a part that loses documents is written once more without them.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoltrain.data.tokens.index import ADDRESSES, HASHES, IDS, SIDES, STARTS, PartRecord, PartSide
from smoltrain.data.tokens.token_files import TokenWriter
from smoltrain.errors import Problem, UserError


@dataclass(frozen=True)
class CleanSource:
    """The parts of a source without the training documents whose texts are held out."""

    records: list[PartRecord]
    num_copies: int  # documents that were left out
    num_repeated: int  # documents to train on beyond the first of each text


class _SideDocuments:
    """The D documents of one side of a source, of all of its parts together: who of them stays."""

    def __init__(self, folder: Path, side: str, records: list[PartRecord], *, is_whole: bool) -> None:
        """is_whole: the source has no other side, and its last tokens are to be held out."""
        self.side, self._folder, self.is_whole = side, folder, is_whole
        self.parts = [record.sides[side] for record in records]
        self._part_borders = np.cumsum([part.documents for part in self.parts])[:-1]
        self.hashes = np.concatenate([np.empty(0, np.uint64), *(self._read(part, HASHES) for part in self.parts)])
        lengths = [np.diff(self._read(part, STARTS), append=np.uint64(part.tokens)) for part in self.parts]
        self._lengths = np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)
        self.keep = np.ones(len(self.hashes), bool)

    def find_tail(self, share: float) -> np.ndarray:
        """Which documents (D,) are held out, at least in part, as the last tokens; none where there are two sides."""
        if not self.is_whole:
            return np.zeros(len(self.hashes), bool)
        lengths = np.where(self.keep, self._lengths, 0)
        total = int(lengths.sum())
        return np.cumsum(lengths) > total - math.ceil(total * share)

    def drop(self, held: np.ndarray) -> None:
        """Leave out the documents whose hashes are among `held` (H,)."""
        self.keep &= ~np.isin(self.hashes, held)

    def drop_before_tail(self, held: np.ndarray, share: float) -> None:
        """Leave out those of them that are not in the tail, which is itself held out."""
        self.keep &= self.find_tail(share) | ~np.isin(self.hashes, held)

    def write_kept(self, dtype: np.dtype) -> list[PartSide]:
        """What stays of each part: the part itself, or files anew."""
        keeps = np.split(self.keep, self._part_borders)
        return [
            part if keep.all() else self._rewrite_part(number, part, keep, dtype)
            for number, (part, keep) in enumerate(zip(self.parts, keeps, strict=True))
        ]

    def _rewrite_part(self, number: int, part: PartSide, keep: np.ndarray, dtype: np.dtype) -> PartSide:
        (ids_file,) = part.file_names(IDS)
        ids = np.memmap(self._folder / ids_file, dtype, mode="r")
        starts, hashes, addresses = (self._read(part, kind).tolist() for kind in (STARTS, HASHES, ADDRESSES))
        ends = [*starts[1:], part.tokens]
        writer = TokenWriter(self._folder, f"{self.side}-{number:05}-apart")
        try:
            for i in np.flatnonzero(keep).tolist():
                writer.begin_document(hashes[i], addresses[i])
                writer.add_ids(ids[starts[i] : ends[i]])
            return writer.commit()
        finally:
            writer.discard()

    def _read(self, part: PartSide, kind: str) -> np.ndarray:
        """(documents of the part,) uint64."""
        values = [np.fromfile(self._folder / name, np.uint64) for name in part.file_names(kind)]
        return values[0] if values else np.empty(0, np.uint64)


def drop_held_out_documents(
    records: dict[str, list[PartRecord]], own: set[str], folder: Path, dtype: np.dtype, share: float
) -> dict[str, CleanSource]:
    """The parts of each source without the training documents whose texts any source holds out.

    `own` are the sources that name what they hold out. Errors: UserError if nothing remains to train on.
    """
    trained: dict[str, _SideDocuments] = {}
    held = [np.empty(0, np.uint64)]
    for name, parts in records.items():
        full = [side for side in SIDES if any(record.sides[side].documents for record in parts)]
        if len(full) == 1 and name not in own:
            trained[name] = _SideDocuments(folder / name, full[0], parts, is_whole=True)
        else:
            trained[name] = _SideDocuments(folder / name, "train", parts, is_whole=False)
            held.append(_SideDocuments(folder / name, "validation", parts, is_whole=False).hashes)
    known = np.unique(np.concatenate(held))

    for side in trained.values():
        if side.is_whole:
            # The tail moves with every document that is left out: first what others hold out, then copies of the tail.
            side.drop(known)
            tail = side.hashes[side.keep & side.find_tail(share)]
            side.drop_before_tail(tail, share)
            known = np.union1d(known, tail)
    return {name: _clean_source(name, records[name], side, known, dtype, share) for name, side in trained.items()}


def _clean_source(
    name: str, records: list[PartRecord], side: _SideDocuments, held: np.ndarray, dtype: np.dtype, share: float
) -> CleanSource:
    side.drop_before_tail(held, share)
    num_copies = int((~side.keep).sum())
    if num_copies and not side.keep.any():
        what, want = f"the source {name!r} has no document to train on", "texts that are not held out as well"
        raise UserError(Problem(what, f"{num_copies:,}, all of them held out", want, "data"))
    trained = side.hashes[side.keep & ~side.find_tail(share)]
    num_repeated = len(trained) - len(np.unique(trained))
    kept = [
        record.model_copy(update={side.side: part})
        for record, part in zip(records, side.write_kept(dtype), strict=True)
    ]
    return CleanSource(kept, num_copies, num_repeated)
