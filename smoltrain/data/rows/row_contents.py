"""What the rows of a step hold, for a person who wants to look: which documents, where they are, how they begin."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents import retry
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.documents.listing import list_one_source
from smoltrain.data.documents.records import Document
from smoltrain.data.documents.retry import ReaderHealth
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.token_files import MappedTokens, content_hash
from smoltrain.errors import UserError

ADDRESS_SEARCH_S = 30.0  # for the addresses of all documents of a step together
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
        more = len(passages) - NUM_SHOWN_PASSAGES
        return f"row {self.position:,} of {self.source!r} ({shown}{f' and {more} more' if more > 0 else ''})"


def document_spans(starts: np.ndarray, begin: int, length: int) -> list[tuple[int, int, int]]:
    """(number, first, last) of each document in the `length` tokens from `begin` on; `starts` (D,) is where they begin.

    first and last count from `begin`; starts[0] is 0.
    """
    kind = starts.dtype.type  # of another type all starts would be converted
    first = int(np.searchsorted(starts, kind(begin), side="right")) - 1
    last = int(np.searchsorted(starts, kind(begin + length)))
    borders = [0, *(int(start) - begin for start in starts[first + 1 : last]), length]
    return [(number, *span) for number, span in enumerate(itertools.pairwise(borders), first)]


def locate_documents(rows: list[RowContents], data: DataSection, prepared: PreparedData) -> list[RowContents]:
    """The rows of a cached run with the addresses of their documents, as far as these can be found.

    The tokens know a document's number only, so the files are read again up to it: those of sources that are wholly on
    this machine and have not changed, for at most SEARCH_S.
    """
    until = time.monotonic() + ADDRESS_SEARCH_S
    found: dict[tuple[str, int | None], str] = {}
    for index, part in enumerate(data.parts):
        wanted = {passage.number for row in rows if row.source == part.name for passage in row.passages}
        numbers = {number for number in wanted if number is not None}
        try:
            for number, document in _reread_documents(part, data, prepared, index) if numbers else ():
                if number in numbers and content_hash(document.text) == int(prepared.train[index].hashes[number]):
                    found[part.name, number] = document.name
                if number >= max(numbers) or time.monotonic() > until:
                    break
        except UserError:  # a file that is gone, or was changed: what was found before it stays
            continue

    def named(row: RowContents) -> RowContents:
        addresses = [found.get((row.source, passage.number), passage.address) for passage in row.passages]
        passages = zip(row.passages, addresses, strict=True)
        return replace(row, passages=tuple(replace(passage, address=address) for passage, address in passages))

    return [named(row) for row in rows]


def _reread_documents(
    part: MixedSource, data: DataSection, prepared: PreparedData, index: int
) -> Iterator[tuple[int, Document]]:
    """(number, document) of each training document of source number `index`; none if some of its files are elsewhere.

    Only files and documents that were tokenised count: held-out ones, and copies of them, are among the others.
    """
    if part.hub:
        return
    tokenised = prepared.index["fingerprint"]["sources"][part.name]["files"]
    shards = [shard for shard in list_one_source(part, data).shards if shard.name in tokenised]
    if not all(shard.is_local for shard in shards):
        return
    about = prepared.index["sources"][part.name]
    share = data.validation_share if about["held_out"] == "documents" else 0.0
    copies = (
        {int(hashed) for tokens in prepared.validation for hashed in tokens.hashes} if about.get("copies") else set()
    )
    number = 0
    for shard in shards:
        for item in retry.read_records_with_retry(shard, part, data=data, health=ReaderHealth()):
            if isinstance(item, Document) and not is_held_out(item.name, share):
                if (
                    copies
                    and content_hash(item.text) in copies
                    and not _is_training_document(item, number, prepared.train[index])
                ):
                    continue
                yield number, item
                number += 1


def _is_training_document(document: Document, number: int, tokens: MappedTokens) -> bool:
    """Whether it is the training document of that number: the one that is cut is held out in part."""
    return number < len(tokens.hashes) and content_hash(document.text) == int(tokens.hashes[number])
