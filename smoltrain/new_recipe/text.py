"""What a recipe must know of its text: how much there is, what a tokenizer makes of it, which documents it holds out.

A sample is read, of a small text all of it. Equal files give equal answers.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import BinaryIO

from smoltrain.config.schema import DataSection, MixedSource
from smoltrain.data.documents.check_files import SEPARATOR_SEARCH_FILES, check_source_files, find_files_with_separator
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.documents.listing import SourceListing, list_one_source
from smoltrain.data.documents.readers import has_fields, read_records
from smoltrain.data.documents.records import Document
from smoltrain.data.documents.shard import Shard, open_shard
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError

SAMPLE_BYTES = 8 * 2**20  # of text
SHARD_BYTES = 2**20  # of text out of one file, unless all files are read whole
SEEN_PER_ID = 100  # times that a rare id should stand in the text (Gowda & May 2020)
MOST_IDS = 49_152  # SmolLM2's
MULTIPLE_OF_IDS = 64
FEWEST_IDS = 257  # each byte, and the separator
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)  # of documents that may be held out


@dataclass(frozen=True)
class TextSample:
    """Documents of a source, and about how much text all of it is."""

    documents: tuple[Document, ...]
    total_bytes: float  # of UTF-8 of the whole source
    is_whole: bool  # the documents are all of it
    num_files: int
    file_bytes: float  # of all files, as they lie there
    notes: tuple[str, ...]  # lines that were found out about the files
    parts_documents: bool  # the separator stands in files that would otherwise be one document each
    all_fields: bool  # records of jsonl or parquet, of which a file holds many

    @property
    def num_bytes(self) -> int:
        """Bytes of the sample."""
        return sum(len(document.text.encode()) for document in self.documents)


@dataclass(frozen=True)
class FittedVocabulary:
    """A size of the tokenizer, and what limits it; how many tokens the whole text gives with it."""

    size: int
    reason: str
    bytes_per_token: float
    text_tokens: float


def sample_text(data: DataSection) -> TextSample:
    """Read the sample. Errors: UserError if there is no file, a file cannot be read, or no file holds any text."""
    (part,) = data.parts
    try:
        listing = list_one_source(part, data)
        parts_documents = _has_separators(part, listing)
        if parts_documents:
            data = data.model_copy(update={"documents": "separator"})
            (part,) = data.parts
        notes = check_source_files({part.name: listing}, data)
    except UserError as error:
        raise UserError(*(_blame_option(problem) for problem in error.problems)) from None
    file_bytes = sum(shard.size or 0 for shard in listing.shards)
    takes_all = file_bytes <= SAMPLE_BYTES
    documents, ratios, is_whole = _read_sample(part, data, listing, math.inf if takes_all else SHARD_BYTES)
    if not documents:
        num_files = len(listing.shards)
        saw = f"none in {num_files:,} file{'s' * (num_files > 1)}"
        raise UserError(Problem("the data hold no text", saw, "at least one document", "--data"))
    num_bytes = sum(len(document.text.encode()) for document in documents)
    return TextSample(
        documents=tuple(documents), total_bytes=num_bytes if is_whole else file_bytes * ratios, is_whole=is_whole,
        num_files=len(listing.shards), file_bytes=file_bytes, notes=tuple(notes), parts_documents=parts_documents,
        all_fields=all(has_fields(shard.name) for shard in listing.shards),
    )  # fmt: skip


def fit_vocabulary(sample: TextSample, largest: int, separator: str) -> FittedVocabulary:
    """As many ids as the text can teach, at most `largest`, which is what the model has room for, and MOST_IDS.

    By Zipf's law the id of rank V stands T / (V ln V) times in T tokens; that is to be SEEN_PER_ID times.
    """
    limits = {"the model": largest, "SmolLM2's": MOST_IDS}
    limits["the text"] = largest_by_zipf(sample.total_bytes)  # at most a token for each byte, until they are counted
    size = max(FEWEST_IDS, _round_ids(min(limits.values())))
    texts = [document.text for document in sample.documents]
    tokenizer = Tokenizer.train_bpe(iter(texts), size, separator)
    num_tokens = _count_tokens(tokenizer, texts)
    limits["the text"] = largest_by_zipf(num_tokens * sample.total_bytes / sample.num_bytes)
    if sample.is_whole and tokenizer.num_ids < size:
        limits["all that the text gives"] = tokenizer.num_ids
    fitted = max(FEWEST_IDS, _round_ids(min(size, *limits.values())))
    if fitted < size:
        tokenizer = Tokenizer.train_bpe(iter(texts), fitted, separator)
        fitted = tokenizer.num_ids if sample.is_whole else fitted
        num_tokens = _count_tokens(tokenizer, texts)
    return FittedVocabulary(
        size=fitted, reason=min(limits, key=lambda name: limits[name]),
        bytes_per_token=sample.num_bytes / num_tokens,
        text_tokens=num_tokens * sample.total_bytes / sample.num_bytes,
    )  # fmt: skip


def largest_by_zipf(num_tokens: float) -> int:
    """The largest V with V ln V at most the tokens / SEEN_PER_ID."""
    wanted = num_tokens / SEEN_PER_ID
    size = 2.0
    for _ in range(50):  # Newton, from below
        size += (wanted - size * math.log(size)) / (math.log(size) + 1)
        size = max(size, 2.0)
    return int(size)


def choose_validation_share(
    sample: TextSample, vocabulary: FittedVocabulary, wanted_tokens: float
) -> tuple[float, float]:
    """The smallest of SHARES that holds out so many tokens, else the largest; and the tokens that it holds out."""
    for share in SHARES:
        tokens = count_held_out_tokens(sample, vocabulary, share)
        if tokens >= wanted_tokens:
            return share, tokens
    return SHARES[-1], count_held_out_tokens(sample, vocabulary, SHARES[-1])


def count_held_out_tokens(sample: TextSample, vocabulary: FittedVocabulary, share: float) -> float:
    """Of a text that was read whole, those of the documents that a run will hold out; of others their expectation.

    Where all documents would be on one side, a run holds out the end of the text.
    """
    held_out = [document for document in sample.documents if is_held_out(document.name, share)]
    if not sample.is_whole or len(held_out) in (0, len(sample.documents)):
        return share * vocabulary.text_tokens
    return sum(len(document.text.encode()) for document in held_out) / vocabulary.bytes_per_token


def _read_sample(
    part: MixedSource, data: DataSection, listing: SourceListing, most: float
) -> tuple[list[Document], float, bool]:
    """Documents up to SAMPLE_BYTES, of each file at most about `most` bytes; bytes of text per byte of the files that
    were read; whether that was all.

    Files are taken in an order that has nothing to do with their names' order, so that the sample is like the whole.
    """
    documents: list[Document] = []
    num_bytes = read_bytes = 0
    is_whole = True
    for shard in sorted(listing.shards, key=lambda shard: hashlib.sha256(shard.name.encode()).digest()):
        if num_bytes >= SAMPLE_BYTES and math.isfinite(most):
            return documents, num_bytes / max(1, read_bytes), False
        opened: list[BinaryIO] = []

        def open_and_keep(shard: Shard, opened: list[BinaryIO] = opened) -> BinaryIO:
            opened.append(open_shard(shard))
            return opened[0]

        of_shard = 0
        position = shard.size or 0
        records = read_records(shard, part, max_document_mib=data.max_document_mib, opener=open_and_keep)
        for record in records:
            if not isinstance(record, Document):
                continue
            size = len(record.text.encode())
            documents.append(record if size <= most else replace(record, text=record.text[: int(most)]))
            of_shard += size
            if of_shard >= most:
                position = opened[0].tell()
                is_whole = False
                break
        records.close()
        num_bytes += of_shard
        read_bytes += position
    return documents, num_bytes / max(1, read_bytes), is_whole


def _has_separators(part: MixedSource, listing: SourceListing) -> bool:
    """Whether the text that parts documents stands in every file of text that is looked into."""
    num_texts = sum(shard.is_local and not has_fields(shard.name) for shard in listing.all_shards)
    return 0 < min(num_texts, SEPARATOR_SEARCH_FILES) == len(find_files_with_separator(part, listing.all_shards))


def _blame_option(problem: Problem) -> Problem:
    """The same, but to be changed is the option that a recipe's key was made of."""
    is_of_path = problem.change.startswith("data.path")
    return replace(problem, change="--data") if is_of_path else problem


def _count_tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Those of the texts, a separator behind each."""
    return sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))


def _round_ids(number: int) -> int:
    return number - number % MULTIPLE_OF_IDS if number >= 2 * FEWEST_IDS else number
