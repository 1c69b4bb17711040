"""The attention bench measures each kernel that can run here, and tells its true error."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import AttentionCase, benchmark_attention, find_runnable_kernels, relative_errors
from smoltrain.config.load import load_config
from smoltrain.config.schema import ModelSection
from smoltrain.errors import UserError
from smoltrain.kernels.attention import AttentionKernel

SMALL = ["batch.sequence_length=32", "batch.micro_batch=2", "engine.device=cpu"]


def test_every_kernel_gets_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "bench.json"
    benchmark_attention("smollm2-135m", [*SMALL, "engine.precision=fp32"], 3, out)
    told = json.loads(out.read_text(encoding="utf-8"))
    assert set(told["measured"]) == {"math", "sdpa", "blocked"}
    for row in told["measured"].values():
        assert row["rounds"] == 3
        assert row["median_s"] > 0
        assert len(row["errors"]) == 4
        assert all(0 < error < 1e-5 for error in row["errors"])
    assert told["settings"]["precision"] == "fp32"
    assert capsys.readouterr().out.count("(auto)") == 1


def right(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """As FlashAttention lays out its tensors, [B, T, H, E]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def test_an_error_is_told():
    section = load_config("smollm2-135m", SMALL).model
    assert isinstance(section, ModelSection)
    cpu = torch.device("cpu")
    assert list(find_runnable_kernels(section, cpu, torch.bfloat16)) == ["math", "sdpa", "blocked"]
    case = AttentionCase(section, 2, 32, cpu, torch.float32, seed=0)
    wrong = AttentionKernel("flash-attn", "1 % too large", lambda q, k, v, causal: 1.01 * right(q, k, v, causal))
    assert relative_errors(case, wrong, case.fp64_reference()) == pytest.approx([0.01] * 4, rel=1e-3)


def test_a_model_of_transformers_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="only our own attention is measured"):
        benchmark_attention("smollm2-135m-hf", SMALL, 1, tmp_path / "bench.json")
