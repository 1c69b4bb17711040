"""What a setup takes from a config, and what from a run."""

import pytest

from smoltrain.config.load import load_config
from smoltrain.errors import UserError
from smoltrain.estimate.training_setup import build_training_setup
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
