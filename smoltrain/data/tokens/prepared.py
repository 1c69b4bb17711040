"""What a run trains on, once it is prepared: its tokenizer, its tokens, and what can be said of them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smoltrain.data.documents.file_kinds import format_counts
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokenizers.round_trip import LOST_SHARE_TO_WARN, RoundTripCounts
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.index import DataIndex, IndexSource
from smoltrain.data.tokens.token_files import MappedTokens, sum_round_trips

MAX_COUNTED_TOKENS = 2**28  # about a second
COUNTED_AT_ONCE = 2**20


class UnusedRows(NamedTuple):
    """How many rows of a model's table no training token reads."""

    num_spare: int  # a smaller vocabulary could do without them
    num_bytes: int  # a BPE of the run's own has an id for each of the 256 bytes, however small it is


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on. Tuples have one element per source of the config, in its order."""

    tokenizer: Tokenizer
    tokenizer_name: str  # as the recipe calls it
    mode: str  # cached or stream
    mode_reason: str
    dtype: np.dtype  # of the ids
    train: tuple[MappedTokens, ...]  # () when streaming
    validation: tuple[MappedTokens, ...]
    shards: tuple[tuple[Shard, ...], ...]  # of the training side; () when cached
    streams: int  # V; 1 when cached
    index: DataIndex

    def describe(self) -> str:
        """One line: mode, how many tokens and documents of each source, how the validation side was held out."""
        sources = self.index.sources
        training = [self._describe_training_side(i, source) for i, source in enumerate(sources.values())]
        if len(sources) > 1:
            training = [f"{name} {text}" for name, text in zip(sources, training, strict=True)]
        streams = f" through {self.streams} streams" if self.mode == "stream" else ""
        num_tokens = sum(source.validation.tokens for source in sources.values())
        num_documents = sum(source.validation.documents for source in sources.values())
        rules = " and ".join(sorted({source.held_out for source in sources.values()}))
        validation = f"validation {num_tokens:,} of {num_documents:,}, held out by {rules}"
        mode = f"{self.mode}, as {self.mode_reason}"
        return "; ".join([mode, f"{', '.join(training)}{streams}", validation, *self._describe_skipped()])

    def describe_tokenizer(self) -> str:
        """One line: name, number of ids, special tokens, how much of the text they spell."""
        t = self.tokenizer
        requested = f" ({self._num_requested_ids:,} were asked for)" if t.num_ids < self._num_requested_ids else ""
        pad = "" if t.pad is None else f", pad {t.pad} = {t.pad_id}"
        line = f"{self.tokenizer_name}: {t.num_ids:,} ids{requested}, separator {t.separator} = {t.separator_id}{pad}"
        counts = self._count_round_trips(validation_only=False)
        if not counts.sampled:  # prepared before this was counted
            return line
        if not counts.lost:
            return f"{line}; nothing of a sample of the text is lost"
        share = f"{counts.lost_share:.2%}" if counts.lost_share >= 0.0001 else "less than 0.01%"
        return f"{line}; {share} of the bytes of a sample of the text is lost"

    def bytes_per_id(self) -> np.ndarray:
        """How many bytes of the validation texts each id stands for, (num_ids,) float64; separators for none.

        Those of Tokenizer.bytes_per_id; bytes that no id spells are shared out evenly over all tokens of these texts.
        """
        counts = self._count_round_trips(validation_only=True)
        sizes = self.tokenizer.bytes_per_id() + counts.unspelled_per_token
        sizes[self.tokenizer.separator_id] = 0
        return sizes

    def count_unused_rows(self, vocab_size: int) -> UnusedRows | None:
        """Rows of a table of `vocab_size` that no training token reads, and that never learn as an input.

        None where the tokens are streamed, or so many that looking at all of them would take long.
        """
        if not self.train or sum(map(len, self.train)) > MAX_COUNTED_TOKENS:
            return None
        is_used = np.zeros(vocab_size, bool)
        for tokens in self.train:
            for ids in tokens.iterate_views(COUNTED_AT_ONCE):
                is_used[ids] = True
        num_unused = vocab_size - int(is_used.sum())
        if not self._num_requested_ids:
            return UnusedRows(num_unused, 0)
        is_byte = self.tokenizer.bytes_per_id() == 1
        num_bytes = int((is_byte & ~is_used[: len(is_byte)]).sum())
        return UnusedRows(num_unused - num_bytes, num_bytes)

    def warnings(self, vocab_size: int) -> list[str]:
        """What is wrong with the tokenizer for these texts, and a model of `vocab_size` rows. One line each."""
        lines = []
        share = self._count_round_trips(validation_only=False).lost_share
        if share >= LOST_SHARE_TO_WARN:
            lost = f"the tokenizer {self.tokenizer_name} cannot spell the text: {share:.2%} of the bytes of a sample"
            lines.append(f"{lost} do not come back from its ids; tokenizer=bpe loses none")
        if self.tokenizer.num_ids < self._num_requested_ids:
            requested = f"{self._num_requested_ids:,} were asked for"
            few = f"the text gave a tokenizer of {self.tokenizer.num_ids:,} ids, {requested}"
            rows = f"{vocab_size - self.tokenizer.num_ids:,} of the {vocab_size:,} rows of the model's table"
            lines.append(f"{few}: {rows} will never be used; smaller are tokenizer.vocab_size and model.vocab_size")
        return lines

    def _describe_training_side(self, number: int, source: IndexSource) -> str:
        if source.train is None:
            return f"{len(source.shards or []):,} files"
        num_documents = len(self.train[number].starts)  # with the one that is cut, where its tail is held out
        repeated = f" ({source.repeated:,} of which repeat another)" if source.repeated else ""
        return f"{source.train.tokens:,} tokens of {num_documents:,} {_plural('document', num_documents)}{repeated}"

    def _describe_skipped(self) -> list[str]:
        """What is not trained on: one phrase for each kind that there is."""
        sources = self.index.sources.values()
        num_copies = sum(source.copies for source in sources)
        num_empty = sum(source.empty_records for source in sources)
        num_bad = sum(source.bad_records for source in sources)
        phrases = []
        if num_copies:
            copies = "copies" if num_copies > 1 else "copy"
            phrases.append(f"{num_copies:,} {copies} of held-out documents left out")
        if self.index.not_read:
            phrases.append(f"not read: {format_counts(self.index.not_read)}")
        if num_empty:
            phrases.append(f"{num_empty:,} {_plural('empty record', num_empty)} passed over")
        if num_bad:
            phrases.append(f"{num_bad:,} {_plural('bad record', num_bad)} skipped")
        return phrases

    @property
    def _num_requested_ids(self) -> int:
        """Ids that a BPE of the run's own was to have; 0 for any other tokenizer."""
        size = self.index.fingerprint.tokenizer.get("bpe")
        return size + (self.tokenizer.pad is not None) if isinstance(size, int) else 0

    def _count_round_trips(self, *, validation_only: bool) -> RoundTripCounts:
        sources = self.index.sources.values()
        return sum_round_trips(
            side for source in sources for side in ([source.validation] if validation_only else source.sides)
        )


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
