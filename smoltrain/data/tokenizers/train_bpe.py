"""The tokenizer that `tokenizer.name=bpe` stands for: a byte-level BPE trained on the run's own documents."""

import math
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from smoltrain.config.schema import Config, DataSection, MixedSource, TokenizerSection
from smoltrain.data.documents import retry
from smoltrain.data.documents.listing import SourceListing
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.documents.records import Document
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers.special_tokens import byte_letter_error, is_byte_letter
from smoltrain.data.tokenizers.tokenizer import Tokenizer, split_text

CHARACTERS_TO_TRAIN_ON = 10**8  # of sources that are large, or not on this machine
MAX_DISTINCT_BYTES = 2**24  # of words that differ: the library needs 80 bytes for each, so 1.3 GB at most
WORD = re.compile(r"\w{1,64}|[^\w\s]{8,64}|\s{8,64}")  # what may be new each time; about what the library counts
WORD_SAMPLING = 64  # one word of so many is remembered
WORD_SCAN_CHARACTERS = 2**16  # are searched for words


class DistinctWordCounter:
    """How many bytes the different words of a text have together, estimated: of English few, of Chinese all.

    The trainer's memory grows with them. Equal texts give equal estimates in every process.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._seen: set[bytes] = set()

    def add(self, text: str) -> None:
        """More of the text."""
        for word in set(WORD.findall(text)):
            raw = word.encode()
            if zlib.crc32(raw) % WORD_SAMPLING == 0 and raw not in self._seen:
                self._seen.add(raw)
                self.num_bytes += len(raw) * WORD_SAMPLING


def check_bpe_separator(section: TokenizerSection) -> None:
    """Known before any text is read. Errors: UserError if the separator is one that no byte-level BPE can have."""
    if section.name == "bpe" and is_byte_letter(section.separator):
        raise byte_letter_error(section.separator, "tokenizer.separator")


@dataclass
class BpeProgress:
    """How far the training of a tokenizer is: first it reads, then it merges, in the library and without a word."""

    total: float  # characters that will be read, about
    read: int = 0
    merging_since: float | None = None  # when the last one was, by the monotonic clock
    truncated_sources: dict[str, int] = field(default_factory=dict)  # left off early -> their characters so far

    def state(self) -> tuple[str, float]:
        """In words, and the share that was read."""
        words = f"{self.read:,} characters to train the tokenizer on"
        if self.merging_since is not None:
            words += f", merged for {time.monotonic() - self.merging_since:.0f} s"
        return words, min(1.0, self.read / max(1.0, self.total))


def train_bpe_tokenizer(
    config: Config, listed: dict[str, SourceListing], *, num_bytes: float, small: bool
) -> Tokenizer:
    """On all documents, the held-out ones too: which ones those are can depend on the number of tokens.

    num_bytes is the size of all sources. If they are not `small`, only the first CHARACTERS_TO_TRAIN_ON are read,
    shared by weight; and of any source only so many as their different words come to MAX_DISTINCT_BYTES.
    """
    section, data = config.tokenizer, config.data
    health = ReaderHealth()
    progress = BpeProgress(num_bytes if small else CHARACTERS_TO_TRAIN_ON)
    all_weights = sum(part.weight for part in data.parts)

    def read_all_texts() -> Iterator[str]:
        for part in data.parts:
            share = part.weight / all_weights
            max_characters = math.inf if small else CHARACTERS_TO_TRAIN_ON * share
            texts = _read_source_texts(part, listed[part.name], data, health)
            yield from _limit_texts(texts, max_characters, share, part.name, progress)
        progress.merging_since = time.monotonic()

    with report_progress(progress.state, health):
        texts = read_all_texts()
        tokenizer = Tokenizer.train_bpe(texts, section.vocab_size or 0, section.separator, section.pad)
    for name, num_characters in progress.truncated_sources.items():
        saw = f"the first {num_characters:,} characters of {name}"
        print(f"data: the tokenizer is trained on {saw}; more have ever more different words, which take memory")
    return tokenizer


def _read_source_texts(
    part: MixedSource, listing: SourceListing, data: DataSection, health: ReaderHealth
) -> Iterator[str]:
    for shard in listing.shards:
        for record in retry.read_records_with_retry(shard, part, data=data, health=health):
            if isinstance(record, Document):
                yield record.text


def _limit_texts(
    texts: Iterator[str], max_characters: float, share: float, name: str, progress: BpeProgress
) -> Iterator[str]:
    """The first texts of a source, in pieces: max_characters or a little more, fewer if their words differ much."""
    words = DistinctWordCounter()
    num_characters = 0
    for text in texts:
        for piece in split_text(text, WORD_SCAN_CHARACTERS):
            yield piece
            words.add(piece)
            progress.read += len(piece)
            num_characters += len(piece)
            if words.num_bytes > MAX_DISTINCT_BYTES * share:
                progress.truncated_sources[name] = num_characters
                return
        if num_characters >= max_characters:
            return
