"""One rule for kernels on this machine and on a GPU that may be elsewhere."""

import pytest
import torch

from smoltrain.config.load import load_config
from smoltrain.errors import UserError
from smoltrain.model.choose_kernels import choose_kernels
from smoltrain.model.interface import ComputeOptions


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


def test_a_plan_that_is_too_short_to_compile_for_is_so_elsewhere_too():
    """6 x parameters x tokens of the whole plan against 1e17 FLOP on CUDA."""
    one = load_config("quickstart")
    tokens = sum(phase.steps for phase in one.phases) * 64 * one.batch.sequence_length
    enough = int(1e17 / (6 * tokens)) + 1
    assert elsewhere(parameters=enough).compiles
    assert not elsewhere(parameters=enough - 2).compiles
    assert elsewhere("engine.compile=on", parameters=1).compiles
    assert not elsewhere("engine.compile=off", parameters=10**12).compiles
    assert not elsewhere(recipe="smollm2-135m-hf", parameters=10**12).compiles, "of transformers"
