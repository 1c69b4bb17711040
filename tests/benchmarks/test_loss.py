"""The loss benchmark measures each kernel, and tells its true error."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import loss
from benchmarks.loss import make_loss_case, measure_loss_kernels
from smoltrain.cli import run_app
from smoltrain.kernels.loss import PLAIN_LOSS, LossKernel

CPU = torch.device("cpu")
FUSED = LossKernel("fused", "a test")


def test_the_bench_measures_each_kernel_against_fp32():
    rows = measure_loss_kernels(
        make_loss_case(64, 50, 16, torch.bfloat16, CPU), {"plain": PLAIN_LOSS, "fused": FUSED}, rounds=1
    )
    for row in rows.values():
        assert row.loss_error < 1e-3
        assert 1e-4 < row.hidden_error < 0.02
        assert 1e-4 < row.weight_error < 0.02
        assert row.peak_mib > 0
        assert row.timed.rounds == 1


def test_every_kernel_of_this_machine_gets_a_row_or_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loss.compile, "missing_for_compile", lambda device: "compiling takes too long for a test")
    words = ["batch.sequence_length=16", "batch.micro_batch=2", "engine.device=cpu", "engine.precision=bf16"]
    with pytest.raises(SystemExit) as left:
        run_app(loss.app, ["quickstart", *words, "--rounds", "1", "--out", str(tmp_path / "bench.json")])
    assert not left.value.code
    told = json.loads((tmp_path / "bench.json").read_text())
    assert {"plain", "fused"} == told["measured"].keys()
    assert told["not_measured"] == {
        "fused, compiled": "compiling takes too long for a test",
        "liger": "Liger's kernel needs CUDA, the device is cpu",
    }
    assert (told["settings"]["tokens"], told["settings"]["width"], told["settings"]["vocabulary"]) == (32, 256, 2048)
    assert "32 tokens x 256 wide x 2048 words in bf16 on cpu" in capsys.readouterr().out
