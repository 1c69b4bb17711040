"""Which parameters are hidden matrices, in whatever model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smoltrain.config.schema import OptimizerSection, TransformersSection
from smoltrain.engine.hidden_matrices import ParameterSplit, split_parameters
from smoltrain.engine.optimizer import OPTIMIZERS
from smoltrain.errors import UserError
from smoltrain.model.build import build_model
from tests import tiny
from tests.engines import Odd, fresh_model


def split_of(folder: Path, *words: str) -> ParameterSplit:
    return split_parameters(fresh_model(tiny.load(folder, *words)))


@pytest.mark.parametrize("tied", [True, False])
def test_of_our_decoder_the_projections(tmp_path: Path, tied: bool) -> None:
    split = split_of(tmp_path, f"model.tie_word_embeddings={tied}", "model.positions=learned")
    assert {name.split(".")[-2] for name in split.hidden} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(split.hidden) == 2 * 7
    tables = ["embed_tokens.weight", "embed_positions.weight"]
    assert list(split.tables) == tables if tied else [*tables, "lm_head.weight"]
    assert not split.others
    assert len(split.vectors) == 5


@pytest.mark.parametrize(
    ("model_type", "shape", "tables", "hidden"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, {"wte", "wpe"}, 2 * 4),
        (
            "llama",
            {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            {"embed_tokens", "lm_head"},
            2 * 7,
        ),
    ],
)
def test_of_transformers_models_too(model_type: str, shape: dict[str, Any], tables: set[str], hidden: int) -> None:
    """gpt2's maps are Conv1D, its head is tied; llama's is not."""
    section = TransformersSection(
        kind="transformers", model_type=model_type, vocab_size=64, max_position_embeddings=24, config=shape
    )
    model = build_model(section, device="meta")
    split = split_parameters(model)
    assert {name.split(".")[-2] for name in split.tables} == tables
    assert len(split.hidden) == hidden
    assert not split.others
    assert len(split.hidden) + len(split.tables) + len(split.vectors) == len(list(model.parameters()))


class Own(nn.Module):
    """A program's own: an attention of torch, a raw table, experts, what is no linear map, a head without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.zeros(16, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts_weight = nn.Parameter(torch.zeros(3, 8, 8))
        self.A_log = nn.Parameter(torch.zeros(8, 4))
        self.gate = nn.Linear(8, 1)
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.wide = nn.Linear(8, 11)  # as wide as the vocabulary, and yet not the last
        self.back = nn.Linear(11, 8)
        self.out = nn.Linear(8, 11, bias=False)


def test_what_is_in_doubt_is_no_hidden_matrix() -> None:
    split = split_parameters(Own())
    assert set(split.hidden) == {"attention.in_proj_weight", "attention.out_proj.weight", "wide.weight", "back.weight"}
    assert set(split.tables) == {"table.weight", "out.weight"}
    assert set(split.others) == {"positions", "experts_weight", "A_log", "gate.weight"}
    assert all(name.endswith("bias") for name in split.vectors)
    assert split.describe() == (
        "muon for 4 hidden matrices (432 parameters), adamw for 2 tables, 4 other tensors and 5 vectors "
        f"({176 + 360 + 24 + 8 + 1 + 11 + 8} parameters)"
    )


def test_a_tied_head_is_there_once() -> None:
    split = split_parameters(Odd())
    assert set(split.hidden) == {"up.weight", "down.weight"}
    assert set(split.tables) == {"embed.weight"}


def test_without_a_hidden_matrix_muon_is_refused() -> None:
    with pytest.raises(UserError, match=r"muon has nothing to orthogonalise: .*optimizer\.kind"):
        OPTIMIZERS["muon"].parameter_groups(nn.Linear(3, 1), OptimizerSection(kind="muon"))


def test_adamw_says_what_it_has() -> None:
    assert OPTIMIZERS["adamw"].describe(nn.Linear(3, 2)) == "adamw for 8 parameters"
