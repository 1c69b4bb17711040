"""The validation side of a source that is streamed: held-out documents, tokenised before the first step."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents import retry
from smoltrain.data.documents.bad_records import BadRecordEntry, check_bad_record_share, log_bad_record
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.documents.listing import SourceListing, has_own_validation
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.documents.records import BadRecord, Document
from smoltrain.data.documents.shard import Shard
from smoltrain.data.order import evenly_spaced_rows
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.index import IndexSource
from smoltrain.data.tokens.packing import encode_documents, token_dtype
from smoltrain.data.tokens.token_files import TokenWriter, content_hash, join_token_parts
from smoltrain.data.tokens.tokenise import held_out_rule, no_documents_error
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
    bad: list[BadRecordEntry] = field(default_factory=list)

    @property
    def num_records(self) -> int:
        """All that came by."""
        return self.num_train + self.num_held_out + self.num_empty + len(self.bad)

    def documents(self, shards: tuple[Shard, ...]) -> Generator[Document]:
        """One document of each of OPEN_SHARDS shards in turn. Evenly spaced shards come first, then the others in
        order.
        """
        first = evenly_spaced_rows(OPEN_SHARDS, len(shards))
        waiting = deque([*first, *(set(range(len(shards))) - set(first))])
        readers: deque[Iterator[Document | BadRecord]] = deque()
        while waiting or readers:
            while waiting and len(readers) < OPEN_SHARDS:
                shard = shards[waiting.popleft()]
                readers.append(retry.read_records_with_retry(shard, self.source, data=self.data, health=self.health))
            reader = readers.popleft()
            record = next(reader, None)
            if record is not None:
                readers.append(reader)
            match record:
                case BadRecord(empty=True):
                    self.num_empty += 1
                case BadRecord():
                    count, num_records = len(self.bad) + 1, self.num_records + 1
                    name = self.source.name
                    self.bad.append(log_bad_record(self.folder, name, record, count, num_records, self.data))
                case Document():
                    yield record


def tokenise_held_out(
    source: MixedSource,
    data: DataSection,
    listing: SourceListing,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    num_tokens: int,
    num_streams: int,
) -> tuple[IndexSource, list[BadRecordEntry]]:
    """Held-out documents of one source until they make `num_tokens`, or the source ends, into FOLDER/NAME/.

    Errors: UserError for bad data, for a source that has no document to hold out, and for one with fewer documents to
    train on than streams.
    """
    has_own = has_own_validation(source)
    share = 0.0 if has_own else data.validation_share
    reader = HeldOutReader(source, data, folder, ReaderHealth())
    writer = TokenWriter(folder / source.name, "validation-00000", tokenizer)

    def write(document: Document) -> None:
        reader.num_held_out += 1
        if writer.num_tokens < num_tokens:
            writer.begin_document(content_hash(document.text))
            for piece in encode_documents([(None, document.text)], tokenizer, token_dtype(tokenizer)):
                writer.add_piece(piece)

    def describe_progress() -> tuple[str, float]:
        words = f"{writer.num_tokens:,} of {num_tokens:,} validation tokens of {source.name}"
        return f"{words} after {reader.num_train:,} documents", min(1.0, writer.num_tokens / num_tokens)

    try:
        with report_progress(describe_progress, reader.health):
            with closing(reader.documents(listing.held_out)) as documents:
                for document in documents:
                    write(document)
                    if writer.num_tokens >= num_tokens:
                        break
            # The training side is read too: until each stream has a document, and for what is held out of it.
            with closing(reader.documents(listing.shards)) as documents:
                for document in documents:
                    if is_held_out(document.name, share):
                        write(document)
                    else:
                        reader.num_train += 1
                    if reader.num_train >= num_streams and (has_own or writer.num_tokens >= num_tokens):
                        break
        check_bad_record_share(folder, source.name, reader.bad, reader.num_records, data)
        _check_document_counts(reader, has_own=has_own, num_streams=num_streams)
        part = writer.commit()
    finally:
        writer.discard()
    made = IndexSource(
        bad_records=len(reader.bad),
        empty_records=reader.num_empty,
        held_out=held_out_rule(source),
        validation=join_token_parts(folder / source.name, "validation", [part], token_dtype(tokenizer)),
        shards=shards_to_json(listing.shards),
    )
    return made, reader.bad


def shards_to_json(shards: tuple[Shard, ...]) -> list[Any]:
    """As the index holds them, without the secrets of their URLs."""
    return [astuple(replace(shard, url=redact_url(shard.url))) for shard in shards]


def shards_from_json(rows: list[Any], source: MixedSource) -> tuple[Shard, ...]:
    """The inverse, with the secrets that the source's own URL brings."""
    own_urls = {redact_url(url): url for url in (source.path, source.validation_path) if url}
    shards = (Shard(*row) for row in rows)
    return tuple(replace(shard, url=own_urls.get(shard.url, shard.url)) for shard in shards)


def _check_document_counts(reader: HeldOutReader, *, has_own: bool, num_streams: int) -> None:
    name, data = reader.source.name, reader.data
    if reader.num_train + reader.num_held_out == 0:
        raise no_documents_error(name, "document", data)
    if reader.num_train < num_streams:
        raise UserError(
            Problem(
                what=f"the source {name!r} has fewer documents than streams",
                saw=f"{reader.num_train} to train on",
                want=f"at least {num_streams}, one per stream",
                change=f"data.streams, or data.mode=cached, or the source {name!r}",
            )
        )
    if reader.num_held_out == 0 and has_own:
        raise no_documents_error(name, "document to validate on", data)
    if reader.num_held_out == 0:
        what = f"no document of the source {name!r} is held out"
        change = f"data.validation_share = {data.validation_share}"
        raise UserError(Problem(what, f"none of {reader.num_train:,}", "at least one", change))
