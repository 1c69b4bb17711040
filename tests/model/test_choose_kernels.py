"""How a model computes on a device is one decision, with a reason for each part of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.load import list_recipes, load_config
from smoltrain.errors import UserError
from smoltrain.estimate.training_setup import model_shape
from smoltrain.kernels import compile
from smoltrain.kernels.compile_gain import GAINS
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
    """About 6 FLOP per parameter and token, rows of 16 tokens: of both phases, also when the first is done."""
    monkeypatch.setattr(compile, "missing_for_compile", lambda _: None)
    steps = Plan(tiny.load(tmp_path).phases).last_step
    minute = int(60 * GAINS["cpu"].flop_per_s / (6 * steps * 4 * 16))  # parameters
    options, reasons = chosen(tmp_path, "engine.compile=auto", parameters=5 * minute)
    assert options.compiles
    assert options.loss.compiles, "the softmax of the loss is compiled with the blocks"
    assert reasons["torch.compile"] == "on, auto: saves about 0.5 of 5.0 minutes of two CPU cores, costs 0.5"
    assert not chosen(tmp_path, "engine.compile=auto", parameters=4 * minute)[0].compiles


# Of a CPU: as before minutes were estimated, from 1e14 FLOP on. Of a GPU: by guesses (compile_gain.py).
SHIPPED = {
    "quickstart": (False, False),
    "shakespeare-80m": (True, False),
    "smollm-149m-mha": (True, False),
    "smollm2-124m": (True, True),
    "smollm2-135m-fast": (True, True),
    "smollm2-135m-hf": (False, False),  # a model of transformers
    "smollm2-135m": (True, True),
}


def test_what_is_compiled_of_the_shipped_recipes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile, "missing_for_compile", lambda _: None)
    found = {}
    for name in list_recipes():
        config = load_config(name)
        num_parameters = model_shape(config.model).parameters
        rows = config.batch.rows(2)
        on_cpu, _ = choose_kernels(config, CPU, "fp32", num_parameters=num_parameters, rows_per_step=rows)
        on_gpu, _ = choose_kernels(
            config, torch.device("cuda"), "bf16", num_parameters=num_parameters, rows_per_step=rows,
            assume_installed=True,
        )  # fmt: skip
        found[name] = (on_cpu.compiles, on_gpu.compiles)
    assert found == SHIPPED


def test_a_model_of_transformers_makes_its_logits_itself(tmp_path: Path):
    options, reasons = chosen(tmp_path, "engine.compile=auto", model=section("llama"), parameters=10**15)
    assert options.attention is not None
    assert (options.attention.name, options.loss.name, options.compiles) == ("sdpa", "plain", False)
    assert reasons["loss kernel"] == "plain, a model of transformers makes its logits itself"
    assert reasons["torch.compile"] == "off, a model of transformers runs as it is written"


# --- a GPU that may be elsewhere


def elsewhere(
    *words: str, recipe: str = "quickstart", precision: str = "bf16", parameters: int = 10**8
) -> ComputeOptions:
    """What is chosen for a CUDA device with all kernels installed, wherever this test runs."""
    options, _ = choose_kernels(
        load_config(recipe, list(words)), torch.device("cuda"), precision, num_parameters=parameters,
        rows_per_step=64, assume_installed=True,
    )  # fmt: skip
    return options


@pytest.mark.parametrize(
    ("words", "precision", "attention", "loss"),
    [
        ((), "bf16", "flash-attn", "liger"),
        ((), "fp32", "sdpa", "liger"),
        (("optimizer.z_loss=1e-4",), "bf16", "flash-attn", "fused"),
        ((), "fp16", "flash-attn", "recomputed"),
        (("engine.attention=math", "engine.loss=plain"), "bf16", "math", "plain"),
        (("engine.attention=sdpa", "engine.loss=fused"), "bf16", "sdpa", "fused"),
    ],
)
def test_kernels_of_a_gpu_elsewhere(words: tuple[str, ...], precision: str, attention: str, loss: str):
    options = elsewhere(*words, precision=precision)
    assert options.attention is not None
    assert (options.attention.name, options.loss.name) == (attention, loss)


def test_what_cannot_run_on_a_gpu_is_refused_before_there_is_one():
    with pytest.raises(UserError, match="the kernel blocked cannot run"):
        elsewhere("engine.attention=blocked")
    with pytest.raises(UserError, match="the kernel flash cannot run"):
        elsewhere("engine.attention=flash", precision="fp32")


def test_cuda_graphs_are_for_a_gpu(tmp_path: Path):
    graphs = ("engine.cuda_graphs=true", "engine.compile=on", "engine.compile_region=model")
    assert elsewhere(*graphs).cuda_graphs
    with pytest.raises(UserError, match="CUDA graphs need a GPU"):
        chosen(tmp_path, *graphs)


def test_a_plan_that_is_too_short_to_compile_for_is_so_elsewhere_too():
    """About 6 x parameters x tokens of the whole plan."""
    one = load_config("quickstart")
    tokens = sum(phase.num_steps for phase in one.phases) * 64 * one.batch.sequence_length
    minute = int(60 * GAINS["cuda"].flop_per_s / (6 * tokens))  # parameters
    assert elsewhere(parameters=2 * minute).compiles
    assert not elsewhere(parameters=minute).compiles
    assert elsewhere("engine.compile=on", parameters=1).compiles
    assert not elsewhere("engine.compile=off", parameters=10**12).compiles
    assert not elsewhere(recipe="smollm2-135m-hf", parameters=10**12).compiles, "of transformers"
