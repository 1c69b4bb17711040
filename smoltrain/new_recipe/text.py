"""What a recipe decides of its text: the vocabulary that it can teach, and which documents are held out."""

import math
from dataclasses import dataclass

from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.new_recipe.sample import TextSample

SEEN_PER_ID = 100  # times that a rare id should stand in the text (Gowda & May 2020)
MOST_IDS = 49_152  # SmolLM2's
MULTIPLE_OF_IDS = 64
FEWEST_IDS = 257  # each byte, and the separator
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)  # of documents that may be held out


@dataclass(frozen=True)
class FittedVocabulary:
    """A size of the tokenizer, and what limits it; how many tokens the whole text gives with it."""

    size: int
    reason: str
    bytes_per_token: float
    text_tokens: float


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
    """Those of the documents that a run will hold out, where their names are known; else their expectation.

    Where all documents would be on one side, a run holds out the end of the text, but not of one that it streams.
    """
    if sample.document_bytes is None:
        return share * vocabulary.text_tokens
    all_bytes = sum(size for _, size in sample.document_bytes)
    held_out = sum(size for name, size in sample.document_bytes if is_held_out(name, share))
    if held_out in (0, all_bytes):
        holds_out_end = sample.needs_cached_mode or not sample.is_streamed
        return share * vocabulary.text_tokens if holds_out_end else 0.0
    return vocabulary.text_tokens * held_out / all_bytes


def _count_tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Those of the texts, a separator behind each."""
    return sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))


def _round_ids(number: int) -> int:
    return number - number % MULTIPLE_OF_IDS if number >= 2 * FEWEST_IDS else number
