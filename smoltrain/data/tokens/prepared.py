"""What a run trains on, once it is prepared: its tokenizer, its tokens, and what can be said of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from smoltrain.data.documents.file_kinds import format_counts
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokenizers.round_trip import LOST_SHARE_TO_WARN, RoundTripCounts, sum_round_trips
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.token_files import SIDES, MappedTokens


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on. Tuples have one element per source of the config, in its order."""

    tokenizer: Tokenizer
    tokenizer_name: str  # as the recipe calls it
    mode: str  # cached or stream
    why: str  # the mode
    dtype: np.dtype  # of the ids
    train: tuple[MappedTokens, ...]  # () when streaming
    validation: tuple[MappedTokens, ...]
    shards: tuple[tuple[Shard, ...], ...]  # of the training side; () when cached
    streams: int  # V; 1 when cached
    index: dict[str, Any]

    def describe(self) -> str:
        """One line: mode, how many tokens and documents of each source, how the validation side was held out."""
        sources = self.index["sources"]
        read = []
        for number, (name, about) in enumerate(sources.items()):
            if self.mode == "stream":
                what = f"{len(about['shards']):,} files"
            else:
                num_documents = len(self.train[number].starts)  # with the one that is cut, where its tail is held out
                what = f"{about['train']['tokens']:,} tokens of {num_documents:,} document{'s' * (num_documents != 1)}"
            read.append(what if len(sources) == 1 else f"{name} {what}")
        held = [sources[name]["validation"] for name in sources]
        total = {key: sum(side[key] for side in held) for key in ("tokens", "documents")}
        rules = " and ".join(sorted({about["held_out"] for about in sources.values()}))
        num_empty = sum(about.get("empty_records", 0) for about in sources.values())
        num_bad = sum(about["bad_records"] for about in sources.values())
        streams = f" through {self.streams} streams" if self.mode == "stream" else ""
        copies = sum(about.get("copies", 0) for about in sources.values())
        skipped = f"; {copies:,} cop{'ies' if copies > 1 else 'y'} of held-out documents left out" if copies else ""
        if others := self.index.get("not_read"):
            skipped += f"; not read: {format_counts(others)}"
        skipped += f"; {num_empty:,} empty record{'s' * (num_empty > 1)} passed over" if num_empty else ""
        skipped += f"; {num_bad:,} bad record{'s' * (num_bad > 1)} skipped" if num_bad else ""
        return (
            f"{self.mode}, as {self.why}; {', '.join(read)}{streams};"
            f" validation {total['tokens']:,} of {total['documents']:,}, held out by {rules}{skipped}"
        )

    def describe_tokenizer(self) -> str:
        """One line: name, number of ids, special tokens, how much of the text they spell."""
        t = self.tokenizer
        asked = f" ({self._num_requested_ids:,} were asked for)" if t.num_ids < self._num_requested_ids else ""
        pad = "" if t.pad is None else f", pad {t.pad} = {t.pad_id}"
        about = f"{self.tokenizer_name}: {t.num_ids:,} ids{asked}, separator {t.separator} = {t.separator_id}{pad}"
        spelled = self._sum_round_trips(*SIDES)
        if not spelled.sampled:  # prepared before this was counted
            return about
        share = f"{spelled.lost_share:.2%}" if spelled.lost_share >= 0.0001 else "less than 0.01%"
        return f"{about}; {f'{share} of the bytes of' if spelled.lost else 'nothing of'} a sample of the text is lost"

    def bytes_per_id(self) -> np.ndarray:
        """How many bytes of the validation texts each id stands for, (num_ids,) float64; separators for none.

        Those of Tokenizer.bytes_per_id; bytes that no id spells are shared out evenly over all tokens of these texts.
        """
        sizes = self.tokenizer.bytes_per_id() + self._sum_round_trips("validation").unspelled_per_token
        sizes[self.tokenizer.separator_id] = 0
        return sizes

    def warnings(self, vocab_size: int) -> list[str]:
        """What is wrong with the tokenizer for these texts, and a model of `vocab_size` rows. One line each."""
        found, share = [], self._sum_round_trips(*SIDES).lost_share
        if share >= LOST_SHARE_TO_WARN:
            lost = f"the tokenizer {self.tokenizer_name} cannot spell the text: {share:.2%} of the bytes of a sample"
            found.append(f"{lost} do not come back from its ids; tokenizer=bpe loses none")
        if self.tokenizer.num_ids < self._num_requested_ids:
            requested = f"{self._num_requested_ids:,} were asked for"
            few = f"the text gave a tokenizer of {self.tokenizer.num_ids:,} ids, {requested}"
            rows = f"{vocab_size - self.tokenizer.num_ids:,} of the {vocab_size:,} rows of the model's table"
            found.append(f"{few}: {rows} will never be used; smaller are tokenizer.vocab_size and model.vocab_size")
        return found

    @property
    def _num_requested_ids(self) -> int:
        """Ids that a BPE of the run's own was to have; 0 for any other tokenizer."""
        asked = self.index.get("fingerprint", {}).get("tokenizer", {}).get("bpe") or 0
        return asked + (self.tokenizer.pad is not None) if asked else 0

    def _sum_round_trips(self, *sides: str) -> RoundTripCounts:
        sources = self.index.get("sources", {}).values()
        return sum_round_trips(about[side] for about in sources for side in sides if side in about)
