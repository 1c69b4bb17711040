"""The precision of a run: what is asked for, as far as the device computes in it."""

import pytest
import torch

from smoltrain.kernels.precision import choose_precision


@pytest.mark.parametrize(
    ("requested", "precision", "reason"),
    [
        ("auto", "bf16", "auto, on a CPU"),
        ("bf16", "bf16", "as the recipe asks"),
        ("fp32", "fp32", "as the recipe asks"),
        ("fp16", "bf16", "DeepSpeed cannot run it on a CPU"),
    ],
)
def test_precision_on_a_cpu_and_its_reason(requested: str, precision: str, reason: str) -> None:
    chosen, why = choose_precision(requested, torch.device("cpu"))
    assert chosen == precision
    assert reason in why


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_auto_asks_the_gpu(monkeypatch: pytest.MonkeyPatch, native: bool, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    assert choose_precision("auto", torch.device("cuda"))[0] == precision
    assert choose_precision("fp16", torch.device("cuda"))[0] == "fp16"
