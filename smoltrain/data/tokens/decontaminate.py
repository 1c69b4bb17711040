"""No text is trained on and validated on, whatever its documents are called: cached tokens, compared by content.

Documents are held out by their names, by files of their own, or as the last tokens of a source. Equal texts under
several names can so fall on both sides; then those of the training side are left out. The parts stay as they are, for
a restart; a part that loses documents is written once more without them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain.data.tokens.token_files import SIDES, TokenWriter
from smoltrain.errors import Problem, UserError


@dataclass
class _SideDocuments:
    """The documents (D,) of one side of a source, in all of its parts."""

    folder: Path
    name: str  # train or validation
    made: list[dict[str, Any]]  # what Writer.commit returned for each part
    is_whole: bool = False  # the source has no other side: its last tokens are to be held out

    def __post_init__(self) -> None:
        self.hashes = [self._read(part, 2) for part in self.made]
        starts = [self._read(part, 1) for part in self.made]
        ends = [np.append(s[1:], np.uint64(part["tokens"])) for s, part in zip(starts, self.made, strict=True)]
        self.lengths = [(e[: len(s)] - s).astype(np.int64) for s, e in zip(starts, ends, strict=True)]
        self.keep = [np.ones(len(hashes), bool) for hashes in self.hashes]

    def _read(self, part: dict[str, Any], kind: int) -> np.ndarray:
        files = list(part["files"])
        return np.fromfile(self.folder / files[kind], np.uint64) if files else np.empty(0, np.uint64)

    def tail_masks(self, share: float) -> list[np.ndarray]:
        """Which documents are held out, at least in part, if the last tokens are; none where there are two sides."""
        if not self.is_whole:
            return [np.zeros(len(hashes), bool) for hashes in self.hashes]
        lengths = np.concatenate([np.where(keep, n, 0) for keep, n in zip(self.keep, self.lengths, strict=True)])
        total = int(lengths.sum())
        tail = np.cumsum(lengths) > total - math.ceil(total * share)
        return np.split(tail, np.cumsum([len(hashes) for hashes in self.hashes])[:-1])

    def drop(self, held: np.ndarray, share: float) -> None:
        """Leave out what is held out elsewhere: `held` (H,) are hashes. The tail itself stays what it is."""
        parts = zip(self.keep, self.hashes, self.tail_masks(share), strict=True)
        self.keep = [keep & (tail | ~np.isin(hashes, held)) for keep, hashes, tail in parts]

    def drop_from_tail_too(self, held: np.ndarray) -> None:
        """The same, of the tail too."""
        self.keep = [keep & ~np.isin(hashes, held) for keep, hashes in zip(self.keep, self.hashes, strict=True)]

    def tail_hashes(self, share: float) -> np.ndarray:
        """Of the documents in the tail."""
        tails = zip(self.keep, self.hashes, self.tail_masks(share), strict=True)
        return np.concatenate([np.empty(0, np.uint64), *(hashes[keep & tail] for keep, hashes, tail in tails)])

    @property
    def num_dropped(self) -> int:
        """Documents that are left out."""
        return sum(int((~keep).sum()) for keep in self.keep)

    def written(self, dtype: np.dtype) -> list[dict[str, Any]]:
        """What stays, as Writer.commit returns it for each part."""
        return [
            part if keep.all() else self._rewrite_part(i, dtype)
            for i, (part, keep) in enumerate(zip(self.made, self.keep, strict=True))
        ]

    def _rewrite_part(self, number: int, dtype: np.dtype) -> dict[str, Any]:
        part = self.made[number]
        ids = np.memmap(self.folder / next(iter(part["files"])), dtype, mode="r")
        writer = TokenWriter(self.folder, f"{self.name}-{number:05}-apart")
        try:
            begin = 0
            for keep, hashed, length in zip(self.keep[number], self.hashes[number], self.lengths[number], strict=True):
                if keep:
                    writer.begin(int(hashed))
                    writer.add(ids[begin : begin + int(length)])
                begin += int(length)
            return writer.commit()
        finally:
            writer.discard()


def drop_held_out_documents(
    records: dict[str, list[dict[str, Any]]], own: set[str], folder: Path, dtype: np.dtype, share: float
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """The records of the parts of each source without the training documents whose texts any source holds out.

    `own` are the sources that name what they hold out. Also returns how many documents of each are left out.
    Errors: UserError if nothing remains to train on.
    """
    trained, held = {}, [np.empty(0, np.uint64)]
    for name, parts in records.items():
        sides = {side: _SideDocuments(folder / name, side, [part[side] for part in parts]) for side in SIDES}
        full = [side for side in SIDES if any(part[side]["documents"] for part in parts)]
        if len(full) == 1 and name not in own:
            trained[name] = sides[full[0]]
            trained[name].is_whole = True
        else:
            trained[name] = sides["train"]
            held += sides["validation"].hashes
    known = np.unique(np.concatenate(held))
    for side in trained.values():
        if side.is_whole:
            side.drop_from_tail_too(known)
            tail = side.tail_hashes(share)
            side.drop(tail, share)
            known = np.union1d(known, tail)
    made = {}
    for name, side in trained.items():
        side.drop(known, share)
        if side.made and not any(keep.any() for keep in side.keep) and side.num_dropped:
            what, want = f"the source {name!r} has no document to train on", "texts that are not held out as well"
            raise UserError(Problem(what, f"{side.num_dropped:,}, all of them held out", want, "data"))
        written = side.written(dtype)
        made[name] = [part | {side.name: new} for part, new in zip(records[name], written, strict=True)]
    return made, {name: side.num_dropped for name, side in trained.items()}
