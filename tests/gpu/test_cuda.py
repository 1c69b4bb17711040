"""What only a CUDA device can show; `./tests/run.sh -m gpu` on such a machine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.errors import DONE
from smoltrain.model import attention
from tests import launches, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; test_attention.py runs the choice"),
]


def heads(num: int) -> torch.Tensor:
    return torch.randn(2, num, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def test_every_kernel_agrees_with_math_forward_and_backward() -> None:
    torch.manual_seed(0)
    q, k, v = heads(9), heads(3), heads(3)
    device, results = torch.device("cuda"), {}
    for name in ("math", "sdpa", "auto"):
        requested: Any = name
        out = attention.attend(q, k, v, attention.choose(requested, device, torch.bfloat16))
        results[name] = (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for name in ("sdpa", "auto"):
        for ours, reference in zip(results[name], results["math"], strict=True):
            error = (ours - reference).float().norm() / reference.float().norm()
            assert error < 0.02, f"{name} is off by {error:.3f}"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_all_gpus_train_save_and_resume(tmp_path: Path, precision: str) -> None:
    config = "zero2_fp16" if precision == "fp16" else "zero2"
    words = tiny.words(tmp_path, f"engine.precision={precision}", f"engine.ds_config={config}")
    assert launches.run("smoltrain", words, tmp_path / "log") == DONE, (tmp_path / "log").read_text()
    losses = launches.losses(tmp_path / "runs" / "quickstart")
    assert sorted(losses) == list(range(1, 13))
    assert losses[12] < losses[1]
