"""The shares are those of a count by hand, whatever the texts are."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smoltrain.data.tokens.token_files import MappedTokens
from smoltrain.evaluation.memorisation import HELD_OUT, RECALLED, WRITTEN, MemorisationProbe, find_reason_unknown
from smoltrain.run.track import METRICS

SEPARATOR = 0
T = 64  # of a row


def tokens(ids: np.ndarray) -> MappedTokens:
    return MappedTokens([ids[:500], ids[500:]], np.zeros(1, np.uint64), np.zeros(1, np.uint64))


@pytest.fixture
def prepared() -> Any:
    """Two sources whose ids are random, with separators; a part of the held-out text stands in the training text."""
    random = np.random.default_rng(1)
    sides = [random.integers(0, 200, 1 + 20 * T).astype(np.uint16) for _ in range(4)]
    sides[2][8:40] = sides[0][100:132]  # behind a prompt of 8 ids: 32 ids that were copied
    sides[2][8:40][sides[2][8:40] == SEPARATOR] = 1
    sides[0][100:132] = sides[2][8:40]
    train = (tokens(sides[0]), tokens(sides[1]))
    return SimpleNamespace(
        train=train, validation=(tokens(sides[2]), tokens(sides[3])), tokenizer=SimpleNamespace(separator_id=SEPARATOR)
    )


def count_by_hand(texts: list[np.ndarray], prepared: Any, length: int) -> tuple[int, int]:
    """(n-grams without a separator, how many of them stand in a training source)."""
    sources = [stream.all().tolist() for stream in prepared.train]
    known = {tuple(ids[i : i + length]) for ids in sources for i in range(len(ids) - length + 1)}
    ngrams = [tuple(text[i : i + length].tolist()) for text in texts for i in range(len(text) - length + 1)]
    ngrams = [ngram for ngram in ngrams if SEPARATOR not in ngram]
    return len(ngrams), sum(ngram in known for ngram in ngrams)


def test_the_shares_are_those_of_a_count_by_hand_in_any_number_of_parts(prepared: Any):
    probe = MemorisationProbe(prepared, [3.0, 1.0], 8, T)
    assert probe.prompts.shape == (16, 8)
    assert probe.num_new_tokens == 56
    held_out = [prepared.validation[0].all(), prepared.validation[1].all()]
    trained = [prepared.train[0].all(), prepared.train[1].all()]
    rows = [*(held_out[0][r * T :] for r in (0, 3, 6, 10, 13, 16)), *(held_out[1][r * T :] for r in (0, 10))]
    assert probe.prompts[:8].tolist() == [row[:8].tolist() for row in rows]
    assert probe.prompts[14:].tolist() == [trained[1][r * T : r * T + 8].tolist() for r in (0, 10)]
    # 56 ids of the training text, across the border of its parts; parts of it; text of nobody; texts of other lengths.
    random = np.random.default_rng(2).integers(1, 200, (16, 56))
    texts = [trained[0][470:526], trained[0][100:130], *random[2:8], *(trained[1][i : i + 56] for i in range(8))]
    probe.take_texts(texts)
    alone = probe.count(probe.search())
    assert probe.count(np.sum([probe.search(part, 3) for part in range(3)], axis=0).tolist()) == alone
    continuations = [row[8:64] for row in rows]
    for kind, written in ((WRITTEN, texts[:8]), (RECALLED, texts[8:]), (HELD_OUT, continuations)):
        for count in alone.counts[kind]:
            assert (count.num_ngrams, count.num_known) == count_by_hand(written, prepared, count.length)
    assert alone.counts[HELD_OUT][0].num_known >= 20, "what follows the first prompt was copied"
    assert alone.counts[RECALLED][1].share == 1
    metrics = alone.metrics()
    assert len(metrics) == 6
    assert metrics.keys() <= METRICS.keys()
    assert "100.0% after training prompts" in alone.describe()


def test_where_texts_are_too_short_nothing_is_said(prepared: Any):
    probe = MemorisationProbe(prepared, [1.0, 1.0], 2, 12)
    assert probe.prompts.shape == (4, 1)
    probe.take_texts([np.arange(1, 12)] * 4)
    found = probe.count(probe.search())
    assert found.metrics() == {}
    assert found.describe() == "no text has 13 tokens, so nothing can be said"


def test_streamed_tokens_cannot_be_known(prepared: Any):
    assert find_reason_unknown(prepared) is None
    prepared.train = ()
    assert "data.mode=cached" in str(find_reason_unknown(prepared))
