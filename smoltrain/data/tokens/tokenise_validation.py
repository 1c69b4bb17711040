"""The validation side of a source that is streamed: held-out documents, tokenised before the first step."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents import retry
from smoltrain.data.documents.bad_records import BadRecordEntry, check_bad_record_share, log_bad_record
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.documents.listing import SourceListing, has_own_validation
from smoltrain.data.documents.records import BadRecord, Document
from smoltrain.data.documents.retry import ReaderHealth
from smoltrain.data.documents.shard import Shard
from smoltrain.data.order import evenly_spaced_rows
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers.round_trip import RoundTripCounter, round_trip_to_json
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.packing import encode_documents
from smoltrain.data.tokens.token_files import TokenWriter, content_hash, join_token_parts
from smoltrain.data.tokens.tokenise import no_documents_error, token_dtype
from smoltrain.errors import Problem, UserError
from smoltrain.redact import redact_url

OPEN_SHARDS = 8  # shards that are open, each with a few MB of its own


@dataclass
class HeldOutReader:
    """One source being read for its held-out documents; counts what comes by."""

    source: MixedSource
    data: DataSection
    folder: Path  # of the log of bad records
    health: ReaderHealth
    num_train: int = 0  # documents to train on
    num_held_out: int = 0
    num_empty: int = 0

    def __post_init__(self) -> None:
        self.bad: list[BadRecordEntry] = []

    @property
    def num_records(self) -> int:
        """All that came by."""
        return self.num_train + self.num_held_out + self.num_empty + len(self.bad)

    def documents(self, shards: tuple[Shard, ...]) -> Generator[Document]:
        """One document of each of AT_ONCE shards in turn. Evenly spaced shards come first, then the others in order."""
        first = evenly_spaced_rows(OPEN_SHARDS, len(shards))
        waiting = deque([*first, *(set(range(len(shards))) - set(first))])
        readers: deque[Iterator[Document | BadRecord]] = deque()
        while waiting or readers:
            while waiting and len(readers) < OPEN_SHARDS:
                shard = shards[waiting.popleft()]
                readers.append(retry.read_records_with_retry(shard, self.source, data=self.data, health=self.health))
            reader = readers.popleft()
            item = next(reader, None)
            if item is not None:
                readers.append(reader)
            if isinstance(item, BadRecord) and item.empty:
                self.num_empty += 1
            elif isinstance(item, BadRecord):
                count, name = len(self.bad) + 1, self.source.name
                self.bad.append(log_bad_record(self.folder, name, item, count, self.num_records + 1, self.data))
            elif item is not None:
                yield item


def tokenise_held_out(
    source: MixedSource,
    data: DataSection,
    listing: SourceListing,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    num_tokens: int,
    num_streams: int,
) -> tuple[dict[str, Any], list[BadRecordEntry]]:
    """Held-out documents of one source until they make `num_tokens`, or the source ends, into FOLDER/NAME/.

    Returns what the index says of the source. Errors: UserError for bad data, for a source that has no document to
    hold out, and for one with fewer documents to train on than streams.
    """
    own = has_own_validation(source)
    share = 0.0 if own else data.validation_share
    reading = HeldOutReader(source, data, folder, ReaderHealth())
    writer, speller = TokenWriter(folder / source.name, "validation-00000"), RoundTripCounter(tokenizer)

    def write(document: Document) -> None:
        reading.num_held_out += 1
        if writer.num_tokens < num_tokens:
            writer.begin(content_hash(document.text))
            for piece in encode_documents([(None, document.text)], tokenizer, token_dtype(tokenizer)):
                writer.add(piece.ids)
                speller.add(piece)

    def state() -> tuple[str, float]:
        words = f"{writer.num_tokens:,} of {num_tokens:,} validation tokens of {source.name}"
        return f"{words} after {reading.num_train:,} documents", min(1.0, writer.num_tokens / num_tokens)

    try:
        with report_progress(state, reading.health):
            with closing(reading.documents(listing.held_out)) as documents:
                for document in documents:
                    write(document)
                    if writer.num_tokens >= num_tokens:
                        break
            with closing(reading.documents(listing.shards)) as documents:
                for document in documents:
                    if is_held_out(document.name, share):
                        write(document)
                    else:
                        reading.num_train += 1
                    if reading.num_train >= num_streams and (own or writer.num_tokens >= num_tokens):
                        break
        check_bad_record_share(folder, source.name, reading.bad, reading.num_records, data)
        _check_document_counts(reading, own=own, num_streams=num_streams)
        made = writer.commit() | {"spelling": round_trip_to_json(speller.found)}
    finally:
        writer.discard()
    option = "validation_split" if source.validation_split else "validation_path"
    about = {
        "bad_records": len(reading.bad),
        "empty_records": reading.num_empty,
        "held_out": option if own else "documents",
        "validation": join_token_parts(folder / source.name, "validation", [made], token_dtype(tokenizer)),
        "shards": shards_to_json(listing.shards),
    }
    return about, reading.bad


def shards_to_json(shards: tuple[Shard, ...]) -> list[list[Any]]:
    """As the index holds them, without the secrets of their URLs."""
    return [list(astuple(replace(shard, url=redact_url(shard.url)))) for shard in shards]


def shards_from_json(rows: list[list[Any]], source: MixedSource) -> tuple[Shard, ...]:
    """The inverse, with the secrets that the source's own URL brings."""
    own = {redact_url(url): url for url in (source.path, source.validation_path) if url}
    found = (Shard(*row) for row in rows)
    return tuple(replace(shard, url=own.get(shard.url, shard.url)) for shard in found)


def _check_document_counts(reading: HeldOutReader, *, own: bool, num_streams: int) -> None:
    name, data = reading.source.name, reading.data
    if reading.num_train + reading.num_held_out == 0:
        raise no_documents_error(name, "document", data)
    if reading.num_train < num_streams:
        what, want = f"the source {name!r} has fewer documents than streams", f"at least {num_streams}, one per stream"
        saw = f"{reading.num_train} to train on"
        raise UserError(Problem(what, saw, want, f"data.streams, or data.mode=cached, or the source {name!r}"))
    if reading.num_held_out == 0:
        if own:
            raise no_documents_error(name, "document to validate on", data)
        what = f"no document of the source {name!r} is held out"
        change = f"data.validation_share = {data.validation_share}"
        raise UserError(Problem(what, f"none of {reading.num_train:,}", "at least one", change))
