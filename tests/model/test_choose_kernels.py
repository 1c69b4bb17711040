"""How a model computes on a device is one decision, with a reason for each part of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.kernels import compile
from smoltrain.model.choose_kernels import choose_kernels
from smoltrain.model.interface import ComputeOptions
from smoltrain.schedule import Plan
from tests import tiny
from tests.model.test_transformers_model import section

CPU = torch.device("cpu")


def chosen(tmp_path: Path, *overrides: str, model: Any = None, parameters: int = 1) -> tuple[ComputeOptions, Any]:
    config = tiny.load(tmp_path, "optimizer.z_loss=1e-4", *overrides)
    config = config if model is None else config.model_copy(update={"model": model})
    return choose_kernels(config, CPU, "fp32", num_parameters=parameters, rows_per_step=4)


def test_a_decoder_gets_what_the_recipe_asks_for(tmp_path: Path):
    options, reasons = chosen(tmp_path, "engine.attention=math", "engine.loss=plain", "engine.compile=off")
    assert options.attention is not None
    assert (options.attention.name, options.loss.name, options.compiles) == ("math", "plain", False)
    assert (options.z_loss, options.gradient_checkpointing) == (1e-4, "none")
    assert reasons == {
        "attention kernel": "math, engine.attention is math",
        "loss kernel": "plain, engine.loss is plain",
        "torch.compile": "off, as engine.compile asks",
    }


def test_compiling_pays_by_the_work_of_the_whole_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """6 FLOP per parameter and token, rows of 16 tokens: of both phases, also when the first is done."""
    monkeypatch.setattr(compile, "missing_for_compile", lambda _: None)
    steps = Plan(tiny.load(tmp_path).phases).last_step
    enough = int(compile.MIN_FLOP["cpu"] / (6 * steps * 4 * 16))
    options, reasons = chosen(tmp_path, "engine.compile=auto", parameters=enough + 1)
    assert options.compiles
    assert options.loss.compiles, "the softmax of the loss is compiled with the blocks"
    assert reasons["torch.compile"].startswith("on, auto: 1.0e+14 FLOP")
    assert not chosen(tmp_path, "engine.compile=auto", parameters=enough - 1)[0].compiles


def test_a_model_of_transformers_makes_its_logits_itself(tmp_path: Path):
    options, reasons = chosen(tmp_path, "engine.compile=auto", model=section("llama"), parameters=10**15)
    assert options.attention is not None
    assert (options.attention.name, options.loss.name, options.compiles) == ("sdpa", "plain", False)
    assert reasons["loss kernel"] == "plain, a model of transformers makes its logits itself"
    assert reasons["torch.compile"] == "off, a model of transformers runs as it is written"
