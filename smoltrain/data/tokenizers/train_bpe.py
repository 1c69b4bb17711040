"""The tokenizer that `tokenizer.name=bpe` stands for: a byte-level BPE trained on the run's own documents."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from smoltrain.config.schema import Config, DataSection, MixedSource, TokenizerSection
from smoltrain.data.documents import retry
from smoltrain.data.documents.listing import SourceListing
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.documents.records import Document
from smoltrain.data.documents.shard import Shard
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers.bpe_sample import NUM_RANKS, DistinctWordCounter, rank_piece, read_fair_pieces
from smoltrain.data.tokenizers.special_tokens import byte_letter_error, is_byte_letter
from smoltrain.data.tokenizers.tokenizer import Tokenizer

CHARACTERS_TO_TRAIN_ON = 10**8  # of sources that are large, or not on this machine
MAX_DISTINCT_BYTES = 2**24  # of words that differ: the library needs 80 bytes for each, so 1.3 GB at most


def check_bpe_separator(section: TokenizerSection) -> None:
    """Known before any text is read. Errors: UserError if the separator is one that no byte-level BPE can have."""
    if section.name == "bpe" and is_byte_letter(section.separator):
        raise byte_letter_error(section.separator, "tokenizer.separator")


@dataclass
class BpeProgress:
    """How far the training of a tokenizer is: words are counted, text is read, then the library merges, silently."""

    total: float  # characters that will be read, about
    counted: int = 0  # of those the different words
    read: int = 0
    merging_since: float | None = None  # when the last one was, by the monotonic clock
    notes: list[str] = field(default_factory=list)  # on which characters, where it is not all of them

    def state(self) -> tuple[str, float]:
        """In words, and the share that was read."""
        words = f"{self.counted:,} characters to train the tokenizer on"
        if self.merging_since is not None:
            merging_s = time.monotonic() - self.merging_since
            words = f"{self.read:,} characters to train the tokenizer on, merged for {merging_s:.0f} s"
        return words, min(1.0, (self.counted + self.read) / max(1.0, 2 * self.total))


def train_bpe_tokenizer(
    config: Config, listed: dict[str, SourceListing], *, num_bytes: float, small: bool
) -> Tokenizer:
    """On all documents, the held-out ones too: which ones those are can depend on the number of tokens.

    num_bytes is the size of all sources. If they are not `small`, only CHARACTERS_TO_TRAIN_ON are read: of each source
    by its weight, of each of its files by its size. And of any source only so many as their different words come to
    MAX_DISTINCT_BYTES.
    """
    section, data = config.tokenizer, config.data
    health = ReaderHealth()
    progress = BpeProgress(num_bytes if small else CHARACTERS_TO_TRAIN_ON)
    all_weights = sum(part.weight for part in data.parts)

    def read_all_texts() -> Iterator[str]:
        for part in data.parts:
            share = part.weight / all_weights
            source = _SourceText(part, listed[part.name].shards, data, health)
            max_characters = math.inf if small else CHARACTERS_TO_TRAIN_ON * share
            yield from _limit_words(source, max_characters, MAX_DISTINCT_BYTES * share, progress)
        progress.merging_since = time.monotonic()

    with report_progress(progress.state, health):
        texts = read_all_texts()
        tokenizer = Tokenizer.train_bpe(texts, section.vocab_size or 0, section.separator, section.pad)
    for note in progress.notes:
        print(f"data: the tokenizer is trained on {note}")
    return tokenizer


@dataclass
class _SourceText:
    """The text of one source."""

    part: MixedSource
    shards: tuple[Shard, ...]
    data: DataSection
    health: ReaderHealth
    num_opened: int = 0  # files
    num_finished: int = 0  # files that were read to their end

    def read_pieces(self, max_characters: float = math.inf) -> Iterator[str]:
        """All of it, or so many characters out of all of its files."""
        return read_fair_pieces(self.shards, max_characters, self._read_texts)

    def _read_texts(self, shard: Shard) -> Iterator[str]:
        self.num_opened += 1
        for record in retry.read_records_with_retry(shard, self.part, data=self.data, health=self.health):
            if isinstance(record, Document):
                yield record.text
        self.num_finished += 1


def _limit_words(
    source: _SourceText, max_characters: float, max_distinct_bytes: float, progress: BpeProgress
) -> Iterator[str]:
    """The pieces of a source, fewer if their words differ too much."""
    name = source.part.name
    is_sample = max_characters < math.inf
    words = DistinctWordCounter()
    sample: list[str] = []  # kept, so that no server is asked for it twice
    num_characters = 0
    for number, piece in enumerate(source.read_pieces(max_characters)):
        words.add(piece, rank_piece(number))
        num_characters += len(piece)
        progress.counted += len(piece)
        if is_sample:
            sample.append(piece)
    if source.num_finished < len(source.shards):
        files = f"{source.num_opened:,} of its {len(source.shards):,} files"
        progress.notes.append(f"a sample of {name}: {num_characters:,} characters out of {files}, by their size")
    num_ranks = words.most_ranks(max_distinct_bytes)
    num_kept = 0
    for number, piece in enumerate(sample if is_sample else source.read_pieces()):
        if rank_piece(number) < num_ranks:
            yield piece
            num_kept += len(piece)
            progress.read += len(piece)
    if num_ranks < NUM_RANKS:
        saw = f"{num_kept:,} of {num_characters:,} characters of {name}, spread evenly"
        progress.notes.append(f"{saw}; more have ever more different words, which take memory")
