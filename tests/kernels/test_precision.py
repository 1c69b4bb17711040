"""The precision of a run: what is asked for, as far as the device computes in it."""

from pathlib import Path

import pytest
import torch

from smoltrain.kernels import precision as precision_module
from smoltrain.kernels.precision import choose_precision


@pytest.mark.parametrize(
    ("requested", "precision", "reason"),
    [
        ("bf16", "bf16", "as the recipe asks"),
        ("fp32", "fp32", "as the recipe asks"),
        ("fp16", "bf16", "DeepSpeed cannot run it on a CPU"),
    ],
)
def test_precision_on_a_cpu_and_its_reason(requested: str, precision: str, reason: str) -> None:
    chosen, why = choose_precision(requested, torch.device("cpu"))
    assert chosen == precision
    assert reason in why


@pytest.mark.parametrize(
    ("processor", "chosen", "reason"),
    [
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16 amx_tile\n", "bf16", "AMX"),
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16\n", "bf16", "twice the speed"),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16\n", "fp32", "not known"),
        ("vendor_id : AuthenticAMD\nflags : avx2\n", "fp32", "not known"),
        (None, "fp32", "not known"),
    ],
)
def test_auto_on_a_cpu_is_what_the_processor_is_fastest_in(
    processor: str | None, chosen: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if processor is not None:
        file.write_text(processor)
    monkeypatch.setattr(precision_module, "PROCESSOR", file)
    precision, why = choose_precision("auto", torch.device("cpu"))
    assert precision == chosen
    assert why.startswith("auto, ")
    assert reason in why


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_auto_asks_the_gpu(monkeypatch: pytest.MonkeyPatch, native: bool, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    assert choose_precision("auto", torch.device("cuda"))[0] == precision
    assert choose_precision("fp16", torch.device("cuda"))[0] == "fp16"
