"""smoltrain.load: text as the command writes it, and a loss that a plain loop gives too."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

import smoltrain
from smoltrain.config.load import override_generation
from smoltrain.inference.load import load_trained_model
from tests.library.conftest import Trained


@pytest.fixture(scope="module")
def model(trained: Trained) -> smoltrain.Model:
    return trained.run.load()


def test_the_text_is_that_of_the_command(model: smoltrain.Model, trained: Trained) -> None:
    loaded = load_trained_model(str(trained.run.folder))
    settings = override_generation(loaded.generation, max_tokens=12, temperature=0.7, top_k=40, top_p=0.9)
    expected = "".join(loaded.generate_text("Naples", settings, greedy=False, seed=3))
    options = {"max_tokens": 12, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 3}
    assert model.generate("Naples", **options) == expected
    pieces = list(model.stream("Naples", **options))
    assert len(pieces) > 2
    assert "".join(pieces) == expected
    assert model.generate("Naples") == model.generate("Naples"), "the seed is the run's"
    assert model.generate("Naples", greedy=True) == model.generate("Naples", temperature=0, seed=9)


@pytest.mark.parametrize("text", ["a", "Naples met Milan on the road. ", "Naples met Milan on the road. " * 30])
def test_the_loss_is_that_of_a_plain_loop(model: smoltrain.Model, text: str) -> None:
    context = model.module.section.max_position_embeddings
    ids = [model.tokenizer.separator_id, *model.tokenizer.encode(text)]
    losses = []
    for place in range(1, len(ids)):
        first = (place - 1) // context * context  # of the stretch that this token is predicted in
        logits_V = model.module(torch.tensor([ids[first:place]]))[0, -1].detach().double()
        losses.append(-float(logits_V.log_softmax(-1)[ids[place]]))
    assert (len(losses) > context) == (len(text) > 100)
    assert model.loss(text) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_what_there_is_to_know_of_a_model(model: smoltrain.Model, trained: Trained) -> None:
    assert model.step == 3
    assert repr(model) == f"Model({str(trained.run.folder)!r}, step=3)"
    assert model.tokenizer.decode(model.tokenizer.encode("Naples")) == "Naples"
    assert sum(p.numel() for p in model.module.parameters()) == 28832
    assert not model.module.training
    assert smoltrain.load(trained.run.folder, 2).step == 2


def test_mistakes_are_the_users_to_read(model: smoltrain.Model, tmp_path: Path) -> None:
    with pytest.raises(smoltrain.UserError, match="no such run"):
        smoltrain.load(tmp_path)
    with pytest.raises(smoltrain.UserError, match="there is no text"):
        model.loss("")
    wrong: Any
    for wrong in (None, 5, ["a", "list"], "half a \ud800"):
        with pytest.raises(smoltrain.UserError, match="the prompt is not text"):
            model.generate(wrong)
        with pytest.raises(smoltrain.UserError, match="want a str that UTF-8 can spell; change the text"):
            model.loss(wrong)
    with pytest.raises(smoltrain.UserError, match="the seed is out of range: saw 'a'"):
        model.generate(seed=cast(Any, "a"))
    with pytest.raises(smoltrain.UserError, match="no checkpoint of this step: saw '2', want one of 2, 3"):
        smoltrain.load(model._loaded.folder, cast(Any, "2"))
    with pytest.raises(smoltrain.UserError, match=r"generation\.top_p is not valid"):
        model.generate(top_p=2.0)
    with pytest.raises(smoltrain.UserError, match="the prompt is too long"):
        model.stream("Naples " * 100)
