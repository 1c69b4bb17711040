"""The tokenizer that `tokenizer.name=bpe` stands for: a byte-level BPE trained on the run's own documents."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from smoltrain.data import faults, special
from smoltrain.data.faults import Health
from smoltrain.data.fingerprints import Listing
from smoltrain.data.progress import telling
from smoltrain.data.readers import Document
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.schema import Config, MixedSource, TokenizerSection

CHARACTERS_TO_TRAIN_ON = 10**8  # of sources that are large, or not on this machine


def check(section: TokenizerSection) -> None:
    """Known before any text is read. Errors: UserError if the separator is one that no byte-level BPE can have."""
    if section.name == "bpe" and special.is_letter(section.separator):
        raise special.no_letter(section.separator, "tokenizer.separator")


@dataclass
class Progress:
    """How far the training of a tokenizer is: first it reads, then it merges, in the library and without a word."""

    total: float  # characters that will be read, about
    read: int = 0
    read_by: float | None = None  # when the last one was, by the monotonic clock

    def state(self) -> tuple[str, float]:
        """In words, and the share that was read."""
        words = f"{self.read:,} characters to train the tokenizer on"
        if self.read_by is not None:
            words += f", merged for {time.monotonic() - self.read_by:.0f} s"
        return words, min(1.0, self.read / max(1.0, self.total))


def train(config: Config, listed: dict[str, Listing], *, num_bytes: float, small: bool) -> Tokenizer:
    """On all documents, the held-out ones too: which ones those are can depend on the number of tokens.

    Of sources that are not `small` on the first CHARACTERS_TO_TRAIN_ON, shared by weight. num_bytes is their size.
    """
    section, data, health = config.tokenizer, config.data, Health()
    progress = Progress(num_bytes if small else CHARACTERS_TO_TRAIN_ON)

    def texts(part: MixedSource) -> Iterator[str]:
        left = math.inf if small else CHARACTERS_TO_TRAIN_ON * part.weight / sum(p.weight for p in data.parts)
        for shard in listed[part.name].shards:
            for item in faults.documents(shard, part, data=data, health=health):
                if isinstance(item, Document):
                    progress.read += len(item.text)
                    yield item.text
                    left -= len(item.text)
                if left <= 0:
                    return

    def everything() -> Iterator[str]:
        for part in data.parts:
            yield from texts(part)
        progress.read_by = time.monotonic()

    with telling(progress.state, health):
        return Tokenizer.train_bpe(everything(), section.vocab_size or 0, section.separator, section.pad)
