"""What the rows of a step hold, for a person who wants to look: which documents, where they are, how they begin."""

import itertools
from dataclasses import dataclass

import numpy as np

NUM_SHOWN_TOKENS = 24  # of a passage that are shown as text
NUM_SHOWN_PASSAGES = 3  # of a row that a line shows


@dataclass(frozen=True)
class Passage:
    """What one document has in a row: the tokens from `first` up to, but without, `last` of the row's T inputs."""

    first: int
    last: int
    address: str = ""  # SHARD, or SHARD:N (from 1) where it has many; '' where it is not known
    number: int | None = None  # from 0, among its source's training documents; None in a stream
    text: str = ""  # the passage's first characters

    def __str__(self) -> str:
        name = self.address or ("a document" if self.number is None else f"training document {self.number:,}")
        return f"{name} {self.text!r}"


@dataclass(frozen=True)
class RowContents:
    """One row of a step, by its position in the run."""

    position: int
    source: str
    passages: tuple[Passage, ...]

    def __str__(self) -> str:
        passages = [passage for passage in self.passages if passage.text] or self.passages  # not a lone separator
        shown = ", ".join(map(str, passages[:NUM_SHOWN_PASSAGES]))
        num_more = len(passages) - NUM_SHOWN_PASSAGES
        more = f" and {num_more} more" if num_more > 0 else ""
        return f"row {self.position:,} of {self.source!r} ({shown}{more})"


def document_spans(starts: np.ndarray, begin: int, length: int) -> list[tuple[int, int, int]]:
    """(number, first, last) of each document in the `length` tokens from `begin` on; `starts` (D,) is where they begin.

    first and last count from `begin`; starts[0] is 0.
    """
    kind = starts.dtype.type  # with a needle of another type numpy would convert all starts
    first = int(np.searchsorted(starts, kind(begin), side="right")) - 1
    last = int(np.searchsorted(starts, kind(begin + length)))
    borders = [0, *(int(start) - begin for start in starts[first + 1 : last]), length]
    return [(number, *span) for number, span in enumerate(itertools.pairwise(borders), first)]
