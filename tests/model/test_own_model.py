"""A module of somebody's own behind the interface of every model; what is no such module is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config, OwnModelSection
from smoltrain.errors import UserError
from smoltrain.estimate.training_setup import model_shape
from smoltrain.inference.generate import generate_ids
from smoltrain.kernels.loss import IGNORE_INDEX
from smoltrain.model.build import build_model
from smoltrain.model.own_model import OwnModel, provide_model, use_own_model

VOCAB = 300


class Recurrent(nn.Module):
    """The smallest module that is a causal language model: one method."""

    def __init__(self, vocab_size: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 8)
        self.mix = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, vocab_size)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids_BT))[0])


class WithLoss(Recurrent):
    """Its own loss and its own cache."""

    factor = 1.0

    def forward(self, ids_BT: Tensor, labels_BT: Tensor | None = None, cache: list[Any] | None = None) -> Tensor:
        hidden, state = self.mix(self.embed(ids_BT), cache[0] if cache else None)
        if cache is not None:
            cache[:] = [state]
        logits = self.head(hidden)
        if labels_BT is None:
            return logits
        return self.factor * F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")

    def new_cache(self, batch: int, max_length: int) -> list[Any]:
        return []


@pytest.fixture
def config() -> Config:
    small = {"vocab_size": VOCAB, "max_position_embeddings": 16}
    return load_config("quickstart", model=small, tokenizer={"vocab_size": 300}, batch={"sequence_length": 16})


def build(config: Config, model: Any, **options: Any) -> OwnModel:
    with provide_model(model):
        built = build_model(use_own_model(config, model).model, **options)
    assert isinstance(built, OwnModel)
    return built


@pytest.mark.parametrize("model_class", [Recurrent, WithLoss])
def test_loss_and_text_are_those_of_the_module(config: Config, model_class: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model = build(config, model_class).eval()
    ids_BT = torch.randint(VOCAB, (3, 7))
    labels_BT = torch.randint(VOCAB, (3, 7))
    labels_BT[0, :3] = IGNORE_INDEX
    with torch.no_grad():
        logits_BTV = model(ids_BT)
        expected = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum")
        assert float(model(ids_BT, labels_BT)) == pytest.approx(float(expected), rel=1e-6)
        text = [3, 4]
        for _ in range(6):
            text.append(int(model.inner(torch.tensor([text]))[0, -1].argmax()))
    generated = generate_ids(model, [3, 4], config.generation.model_copy(update={"max_tokens": 6}), greedy=True)
    assert list(generated) == text[2:], "with its cache, or without one"


def test_a_module_is_copied_and_a_function_is_called_after_the_seed(config: Config) -> None:
    module = Recurrent().half()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = build(config, module)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        model.inner.get_parameter("head.weight").zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        weights.append(build(config, Recurrent).inner.get_parameter("head.weight"))
    assert torch.equal(*weights)
    assert {p.device.type for p in build(config, Recurrent, device="meta").parameters()} == {"meta"}


def test_what_the_config_says_of_it(config: Config) -> None:
    own = use_own_model(config, Recurrent())
    section = OwnModelSection(kind="own", class_name="Recurrent", vocab_size=VOCAB, max_position_embeddings=16)
    assert own.model == section
    assert own.engine.gradient_checkpointing == "none"
    assert Config.model_validate(own.model_dump()) == own
    assert use_own_model(config, Recurrent).model == section
    assert use_own_model(own, Recurrent) == own


class SeesAll(Recurrent):
    def forward(self, ids_BT: Tensor) -> Tensor:
        return super().forward(ids_BT.flip(1)).flip(1)


class SeesAllButPadding(Recurrent):
    """Attention with a mask of padding, and none of what comes later. Of padding alone everything is nan."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embed(ids_BT)
        mask_B1T = torch.zeros(ids_BT.shape).masked_fill(ids_BT == 0, -torch.inf)[:, None]
        return x_BTD @ self.embed.weight.T + torch.softmax(mask_B1T, -1) @ x_BTD @ self.embed.weight.T


class MeanLoss(WithLoss):
    factor = 0.5


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Recurrent(VOCAB - 1), "<lambda> does not know every id"),
        (lambda: Recurrent(VOCAB + 1), r"<lambda> returns no logits: saw \[2, 4, 301\]"),
        (SeesAll, "SeesAll sees the future"),
        (SeesAllButPadding, "SeesAllButPadding sees the future"),
        (MeanLoss, "MeanLoss returns another loss"),
        (lambda: 3, "the model is no torch module: saw int"),
    ],
)
def test_what_is_no_language_model_is_refused(config: Config, model: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(config, model)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"engine": {"compile": "on"}}, "nothing is known of a model of one's own: compile"),
        ({"engine": {"attention": "math"}}, "nothing is known of a model of one's own: attention"),
        (
            {"batch": {"micro_batch": "auto", "accumulation": None, "rows_per_step": 8}},
            "no micro-batch can be estimated",
        ),
    ],
)
def test_what_only_other_models_can_do_is_refused(sections: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        use_own_model(load_config("quickstart", **sections), Recurrent)


def test_options_that_the_module_must_take_are_looked_for(config: Config) -> None:
    with pytest.raises(UserError, match="a forward of Recurrent without positions_BT"):
        build(config, Recurrent, document_mask=True)


def test_no_command_can_build_or_estimate_it(config: Config, tmp_path: Path) -> None:
    section = use_own_model(config, Recurrent).model
    with pytest.raises(UserError, match="this model is one of a program's own: saw Recurrent"):
        build_model(section, device="meta")
    with provide_model(Recurrent), pytest.raises(UserError, match="cannot be estimated"):
        model_shape(section)
