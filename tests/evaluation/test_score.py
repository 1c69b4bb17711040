"""Windows in which each token is scored once, and scores that do not depend on what is computed beside them."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.errors import TrainingStopped
from smoltrain.evaluation import score
from smoltrain.evaluation.score import Window, batch_windows, make_windows, plan_batches, score_batch
from smoltrain.inference.load import LoadedModel

PREFIX = 1000


@given(st.lists(st.lists(st.integers(0, 99), max_size=30), max_size=6), st.integers(1, 12), st.data())
def test_each_token_is_scored_once_behind_as_much_as_the_stride_leaves(
    pieces: list[list[int]], context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    tokens = [token for piece in pieces for token in piece]
    text = [PREFIX, *tokens]
    scored: list[int] = []
    for number, window in enumerate(make_windows(pieces, PREFIX, context, stride)):
        assert window.ids == text[number * stride : number * stride + len(window.ids)], "windows begin stride apart"
        assert len(window.ids) <= context + 1
        assert 0 < window.num_scored < len(window.ids)
        assert len(window.ids) - window.num_scored >= (1 if number == 0 else context - stride + 1)
        scored += window.ids[-window.num_scored :]
    assert scored == tokens


def test_no_more_of_a_text_is_read_than_the_window_needs() -> None:
    taken: list[int] = []

    def pieces() -> Iterator[list[int]]:
        for number in range(100):
            taken.append(number)
            yield [number] * 4

    windows = make_windows(pieces(), PREFIX, context=6, stride=3)
    for _ in range(3):
        next(windows)
    assert len(taken) == 3, "of the text and its prefix the third window ends with id 12"


def test_batches_hold_what_the_limits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "MAX_BATCH_TOKENS", 12)
    monkeypatch.setattr(score, "MAX_BATCH_LOGITS", 90)
    windows = [Window(range(length + 1), 1) for length in (2, 3, 6, 1, 20, 2)]

    def lengths(batches: list[list[Window]]) -> list[list[int]]:
        return [[len(window.ids) - 1 for window in batch] for batch in batches]

    assert lengths(list(batch_windows(windows, 1))) == [[2, 3], [6, 1], [20], [2]]
    assert lengths(list(batch_windows(windows, 10))) == [[2, 3], [6], [1], [20], [2]]
    planned = plan_batches(windows, 1)
    assert planned == [[4], [2, 1], [0, 5, 3]]
    assert lengths([[windows[place] for place in batch] for batch in planned]) == [[20], [6, 3], [2, 2, 1]]


def test_a_score_is_that_of_its_window_alone(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 40, 17, 64)
    texts = [torch.randint(0, 320, (length + 1,), generator=generator).tolist() for length in lengths]
    with torch.no_grad():
        greedy = int(loaded.model(torch.tensor([texts[1][:-1]]))[0, -1].argmax())
    texts[1][-1] = greedy
    windows = [Window(texts[0], 3), Window(texts[1], 1), Window(texts[2], 5), Window(texts[3], 64)]
    found = score_batch(loaded.model, windows)
    for window, (log_probability, is_greedy) in zip(windows, found, strict=True):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([window.ids[:-1]]))[0]
        by_hand = F.log_softmax(logits.double(), -1)[range(len(logits)), list(window.ids[1:])][-window.num_scored :]
        assert log_probability == pytest.approx(float(by_hand.sum()), rel=1e-6)
        assert is_greedy == (window is windows[1])
    assert not loaded.model.training


def test_a_model_that_has_lost_its_numbers_is_not_judged(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.model, "forward", lambda ids_BT: torch.full((*ids_BT.shape, 320), torch.nan))
    with pytest.raises(TrainingStopped, match="not finite"):
        score_batch(loaded.model, [Window([1, 2, 3], 2)])
