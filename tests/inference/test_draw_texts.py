"""Texts drawn together are what each would be alone, and nothing of torch or the model changes by it."""

from typing import Any

import numpy as np
import pytest
import torch

from smoltrain.config.schema import GenerationSection
from smoltrain.errors import TrainingStopped
from smoltrain.inference.draw_texts import draw_texts
from smoltrain.inference.generate import generate_ids
from tests import folders
from tests.inference.test_generate import DECODER, GPT2, fresh

PROMPTS = np.array([[3, 1, 4], [1, 5, 9], [2, 6, 5]])


@pytest.mark.parametrize("section", [DECODER, GPT2], ids=["decoder", "transformers"])
def test_a_sure_model_draws_what_it_writes_greedily_one_text_at_a_time(section: Any):
    sure = fresh(section) if section is GPT2 else folders.lively(DECODER)
    with torch.no_grad():
        for parameter in list(sure.parameters())[:1]:  # the table, which is the head too
            parameter.mul_(300)
    sure.train()
    state = torch.get_rng_state()
    alone = [
        list(generate_ids(sure, ids, GenerationSection(max_tokens=12), greedy=True, banned_ids=[7]))
        for ids in PROMPTS.tolist()
    ]
    together = draw_texts(sure, PROMPTS, 12, stop_ids=(), banned_ids=[7])
    assert [text.tolist() for text in together] == alone
    assert sure.training
    assert torch.equal(state, torch.get_rng_state())


def test_a_text_ends_before_its_first_stop_and_banned_ids_are_never_drawn():
    model = fresh(DECODER)
    free = draw_texts(model, PROMPTS, 20, stop_ids=(), seed=5)
    stop = int(free[1][4])
    stopped = draw_texts(model, PROMPTS, 20, stop_ids=[stop], seed=5, banned_ids=[stop])  # a stop stays allowed
    for text, whole in zip(stopped, free, strict=True):
        assert stop not in text
        assert text.tolist() == whole[: len(text)].tolist()
        assert len(text) == 20 or whole[len(text)] == stop
    assert len(stopped[1]) <= 4
    assert stop not in np.concatenate(draw_texts(model, PROMPTS, 20, stop_ids=(), banned_ids=[stop], seed=5))


def test_logits_that_are_no_numbers_stop_it():
    model = fresh(DECODER)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingStopped, match="not finite"):
        draw_texts(model, PROMPTS, 2, stop_ids=())
