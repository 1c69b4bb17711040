"""How much of what a model writes stands in its training tokens, word for word, beside the same of held-out text.

The model goes on from the first tokens of held-out rows, and of rows that it trains on, at temperature 1. Of the new
tokens every 13-gram and every 50-gram is looked for in all training tokens. 13 tokens is the length by which GPT-3's
overlaps were measured (Brown et al. 2020, appendix C), 50 that by which copies in what models write are counted (Lee et
al. 2022). Two kinds of prompts, because a model that knows its text by heart may be led to it by its own words alone
(Carlini et al. 2023). Text that nobody copied also repeats what others wrote, as a licence does: so what really follows
the held-out prompts is counted alike (McCoy et al. 2023), and only what the model writes beyond that is memorised.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from smoltrain.data.order import apportion_by_weight, evenly_spaced_rows
from smoltrain.data.tokens.packing import count_rows
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.token_files import MappedTokens
from smoltrain.evaluation.ngram_search import BLOCK_TOKENS, find_ngrams

NGRAM_LENGTHS = (13, 50)  # tokens
NUM_TEXTS = 32  # after held-out prompts, and as many after training prompts
PROMPT_TOKENS = 16
NEW_TOKENS = 128
# The kinds of text, as in the metrics' names: memorisation/KIND_of_13_grams.
WRITTEN = "share"  # by the model, after held-out prompts
RECALLED = "recalled_share"  # by the model, after training prompts
HELD_OUT = "held_out_share"  # by nobody: what follows the held-out prompts
KINDS = (WRITTEN, RECALLED, HELD_OUT)
KIND_NAMES = {WRITTEN: "after held-out prompts", RECALLED: "after training prompts", HELD_OUT: "in held-out text"}


@dataclass(frozen=True)
class NgramCount:
    """n-grams of one length: how many there are, and how many of them stand in the training tokens."""

    length: int
    num_ngrams: int
    num_known: int

    @property
    def share(self) -> float | None:
        """Of the n-grams those that are known; None where there are none, as the texts are shorter."""
        return self.num_known / self.num_ngrams if self.num_ngrams else None


@dataclass(frozen=True)
class Memorisation:
    """The n-grams of each kind of text, one count for each length."""

    counts: dict[str, tuple[NgramCount, ...]]  # by KINDS

    def metrics(self) -> dict[str, float]:
        """The shares that there are, by the names of track.METRICS."""
        shares: dict[str, float] = {}
        for kind, counts in self.counts.items():
            for count in counts:
                if count.share is not None:
                    shares[f"memorisation/{kind}_of_{count.length}_grams"] = count.share
        return shares

    def describe(self) -> str:
        """One line: the shares of each length."""
        phrases: list[str] = []
        for number, length in enumerate(NGRAM_LENGTHS):
            shares = {kind: self.counts[kind][number].share for kind in KINDS}
            told = [f"{share:.1%} {KIND_NAMES[kind]}" for kind, share in shares.items() if share is not None]
            if shares[WRITTEN] is not None or shares[RECALLED] is not None:
                phrases.append(f"of the {length}-grams {', '.join(told)}")
        if not phrases:
            return f"no text has {NGRAM_LENGTHS[0]} tokens, so nothing can be said"
        return f"in the training tokens stand {'; '.join(phrases)}"


def find_reason_unknown(prepared: PreparedData) -> str | None:
    """Why nobody can know what is copied, and what to change; None where the training tokens lie ready."""
    if prepared.train:
        return None
    return (
        "the training tokens are streamed and nothing keeps them, so nobody can say which text stands in them; "
        "data.mode=cached keeps them"
    )


class MemorisationProbe:
    """Prompts for a model to go on from, and the question which n-grams of its texts stand in the training tokens."""

    def __init__(self, prepared: PreparedData, weights: Sequence[float], num_texts: int, sequence_length: int) -> None:
        """The prompts begin rows of all sources, by their weights, evenly spaced. Training tokens must lie ready."""
        num_prompt = max(1, min(PROMPT_TOKENS, sequence_length // 8))
        length = min(num_prompt + NEW_TOKENS, sequence_length)
        held_out = _read_row_beginnings(prepared.validation, weights, num_texts, sequence_length, length)
        trained = _read_row_beginnings(prepared.train, weights, num_texts, sequence_length, num_prompt)
        self.prompts = np.concatenate((held_out[:, :num_prompt], trained))  # (texts, tokens): held-out, then training
        self.num_new_tokens = length - num_prompt
        self._prepared = prepared
        self._held_out = held_out[:, num_prompt:]
        self._ngrams: list[np.ndarray] = []

    def take_texts(self, texts: Sequence[np.ndarray]) -> None:
        """What the model has written behind each prompt, as `draw_texts` gives it."""
        num_held_out = len(self._held_out)
        kinds = (texts[:num_held_out], texts[num_held_out:], list(self._held_out))
        separator_id = self._prepared.tokenizer.separator_id
        self._ngrams = [_cut_ngrams(kind, length, separator_id) for kind in kinds for length in NGRAM_LENGTHS]

    def search(self, part: int = 0, num_parts: int = 1) -> list[int]:
        """1 for each n-gram that stands in this process' part of the training tokens, else 0. They are read once."""
        streams = (tokens.iterate_views(BLOCK_TOKENS) for tokens in self._prepared.train)
        return np.concatenate(find_ngrams(self._ngrams, streams, part, num_parts)).astype(int).tolist()

    def count(self, found: Sequence[int]) -> Memorisation:
        """What `search` says, or the sums of what it says in all processes."""
        borders = np.cumsum([len(ngrams) for ngrams in self._ngrams])[:-1]
        known = iter(np.split(np.asarray(found, int), borders))
        counts: dict[str, tuple[NgramCount, ...]] = {}
        for kind in KINDS:
            own = [next(known) for _ in NGRAM_LENGTHS]
            counts[kind] = tuple(
                NgramCount(length, len(is_known), int(np.count_nonzero(is_known)))
                for length, is_known in zip(NGRAM_LENGTHS, own, strict=True)
            )
        return Memorisation(counts)


def _read_row_beginnings(
    sources: Sequence[MappedTokens], weights: Sequence[float], num_rows: int, sequence_length: int, length: int
) -> np.ndarray:
    """The first `length` ids of `num_rows` rows, (num_rows, length); a source that has too few gives them again."""
    rows = []
    counts = apportion_by_weight(max(num_rows, len(weights)), tuple(weights))
    for tokens, count in zip(sources, counts, strict=True):
        chosen = np.resize(evenly_spaced_rows(count, count_rows(len(tokens), sequence_length)), count)
        rows.append(tokens.read_rows(chosen * sequence_length, length))
    return np.concatenate(rows).astype(np.int64)


def _cut_ngrams(texts: Sequence[np.ndarray], length: int, separator_id: int) -> np.ndarray:
    """Every window of `length` ids without a separator, (K, length): no model writes on behind one."""
    windows = np.concatenate([np.empty((0, length), np.int64), *_view_ngrams(texts, length)])
    return windows[(windows != separator_id).all(axis=1)]


def _view_ngrams(texts: Sequence[np.ndarray], length: int) -> Iterator[np.ndarray]:
    for ids in texts:
        if len(ids) >= length:
            yield np.lib.stride_tricks.sliding_window_view(ids, length)
