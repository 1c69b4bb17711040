"""The tokenizer that `tokenizer.name=bpe` stands for: a byte-level BPE trained on the run's own documents."""

import math
from collections.abc import Iterator
from itertools import chain

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


def train(config: Config, listed: dict[str, Listing], *, small: bool) -> Tokenizer:
    """On all documents, the held-out ones too: which ones those are can depend on the number of tokens.

    Of sources that are not `small` on the first CHARACTERS_TO_TRAIN_ON, shared by weight.
    """
    section, data, health = config.tokenizer, config.data, Health()

    def texts(part: MixedSource) -> Iterator[str]:
        left = math.inf if small else CHARACTERS_TO_TRAIN_ON * part.weight / sum(p.weight for p in data.parts)
        for shard in listed[part.name].shards:
            for item in faults.documents(shard, part, data=data, health=health):
                if isinstance(item, Document):
                    yield item.text
                    left -= len(item.text)
                if left <= 0:
                    return

    with telling(None, health):
        everything = chain.from_iterable(texts(part) for part in data.parts)
        return Tokenizer.train_bpe(everything, section.vocab_size or 0, section.separator, section.pad)
