"""What a setup takes from a config, and what from a run."""

import pytest

from smoltrain.config.load import load_config
from smoltrain.errors import UserError
from smoltrain.estimate.training_setup import build_training_setup, model_shape
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.loss import LossKernel
from smoltrain.model.interface import ComputeOptions


def test_a_run_hands_over_what_it_has_settled():
    settings = load_config("quickstart")
    computing = ComputeOptions(attention=AttentionKernel("math", ""), loss=LossKernel("plain", ""), compiles=True)
    case = build_training_setup(
        settings, world=2, device="cpu", rows_per_step=24, precision="fp32", computing=computing
    )
    assert (case.attention, case.loss, case.precision, case.compiled_blocks) == ("math", "plain", "fp32", True)
    assert case.accumulation == 24 // (settings.batch.micro_batch_rows * 2)
    with pytest.raises(UserError, match="do not divide"):
        build_training_setup(settings, world=2, device="cpu", rows_per_step=25)


@pytest.mark.parametrize(
    ("recipe", "words", "depth_and_width"),
    [
        ("smollm2-135m", [], (30, 576)),
        ("shakespeare-80m", [], (6, 768)),
        ("quickstart", ["model.mlp=gelu"], (2, 256)),
        ("smollm2-135m-hf", [], (30, 576)),
    ],
)
def test_blocks_and_width_of_either_kind_of_model(recipe: str, words: list[str], depth_and_width: tuple[int, int]):
    shape = model_shape(load_config(recipe, words).model)
    assert (shape.layers, shape.width) == depth_and_width


def test_ours_and_the_same_of_transformers_have_one_shape():
    """Of a Llama: parameters, the tables among them, and what activations depend on."""
    ours, theirs = (model_shape(load_config(recipe).model) for recipe in ("smollm2-135m", "smollm2-135m-hf"))
    assert ours == theirs
