"""The benchmark of the loss measures what it says."""

import torch

from benchmarks.loss import make_loss_case, measure_loss_kernels
from smoltrain.kernels.loss import PLAIN_LOSS, LossKernel


def test_the_bench_measures_each_kernel_against_fp32():
    case = make_loss_case(64, 50, 16, torch.bfloat16, torch.device("cpu"))
    rows = measure_loss_kernels(case, {"plain": PLAIN_LOSS, "fused": LossKernel("fused", "test")}, rounds=1)
    for row in rows.values():
        assert row.loss_error < 1e-3
        assert 1e-4 < row.hidden_error < 0.02
        assert 1e-4 < row.weight_error < 0.02
        assert row.peak_mib > 0
        assert row.timed.rounds == 1
