"""What can be proven of a GPU without one: devices and operators of a step, and Liger's kernels as machine code.

The long tests need a torch that is built for CUDA, beside this one. They make an environment for it, which takes a
few minutes and 6 GB; or they take the Python in $SMOLTRAIN_CUDA_PYTHON, if it has torch for CUDA, liger-kernel and
flash-attn-4.
"""

import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smoltrain.kernels.attention import AttentionKernel
from smoltrain.model import decoder as decoder_module
from tests.kernels.fake_cuda import LOSSES, DeviceMix
from tests.model.tiny_decoders import LLAMA, section
from tests.models import build_with

ROOT = Path(__file__).parents[2]
NEEDED_GIB = 12
KERNELS = {"sdpa": AttentionKernel("sdpa", ""), "math": AttentionKernel("math", "")}


def run_on_meta(kernel: AttentionKernel, loss: Any, mode: Any, masked: bool) -> DeviceMix:
    """Forward and backward on a device that has no numbers; what touches host memory is refused."""
    model = build_with(
        section(LLAMA), device="meta", attention=kernel, loss=loss, gradient_checkpointing=mode, z_loss=1e-4
    )
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    with DeviceMix() as mix:
        model(ids, ids, positions_BT=ids if masked else None).backward()
    assert all(weight.grad is not None and weight.grad.is_meta for weight in model.parameters())
    return mix


@pytest.mark.parametrize(
    ("kernel", "loss", "mode", "masked"),
    [("sdpa", "fused", "selective", False), ("sdpa", "recomputed", "full", True), ("math", "plain", "none", False)],
)
def test_no_operator_of_a_step_touches_host_memory(kernel: str, loss: str, mode: Any, masked: bool):
    """All combinations, with the kernels of a GPU, are those of test_a_decoder_is_right_on_fake_cuda."""
    assert run_on_meta(KERNELS[kernel], LOSSES[loss], mode, masked).counts.total() > 100


def test_a_tensor_that_is_made_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch):
    real = decoder_module.compute_rotary_angles

    def angles(positions: Tensor, *options: Any) -> Any:
        return [x.to("meta") for x in real(torch.empty(positions.shape, dtype=torch.long).fill_(1), *options)]

    monkeypatch.setattr(decoder_module, "compute_rotary_angles", angles)
    with pytest.raises(AssertionError, match=r"touches \[1, 16\] in host memory"):
        run_on_meta(KERNELS["sdpa"], LOSSES["fused"], "none", False)


def test_a_number_that_the_host_waits_for_is_found():
    with DeviceMix(), pytest.raises(AssertionError, match="the host waits"):
        torch.ones(1).item()


@pytest.fixture(scope="module")
def cuda_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Python whose torch is built for CUDA; all else it has from this environment."""
    given = os.environ.get("SMOLTRAIN_CUDA_PYTHON")
    if given:
        yield Path(given)
        return
    folder = tmp_path_factory.mktemp("cuda")
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEEDED_GIB:
        pytest.skip(f"{free:.0f} GiB are free, a torch for CUDA needs {NEEDED_GIB}; test_attention.py tests the choice")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "torch", "liger-kernel>=0.8.5"], check=True)
    subprocess.run([*install, "--pre", "flash-attn-4"], check=True)
    # Found after the environment's own packages, so that torch is the one for CUDA.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    yield python
    shutil.rmtree(folder)  # pytest would keep 6 GB for three runs


def run_program(python: Path, *words: str, **variables: str) -> str:
    """What a module of the tests prints under another Python."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [str(python), "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_decoder_is_right_on_fake_cuda(cuda_python: Path):
    assert " cases of torch " in run_program(cuda_python, "tests.kernels.fake_cuda")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ligers_kernels_compile_for_every_gpu(cuda_python: Path):
    assert run_program(cuda_python, "tests.kernels.liger_ahead", "compile").count(" bytes\n") == 10


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ligers_kernels_are_right_in_the_interpreter(cuda_python: Path):
    said = run_program(cuda_python, "tests.kernels.liger_ahead", "interpret", TRITON_INTERPRET="1")
    assert said.count("off by") == 3


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("gpu", ["sm_90", "sm_100", "sm_120"])
def test_flash_attention_4_compiles_what_our_operators_call(gpu: str, cuda_python: Path):
    assert run_program(cuda_python, "tests.kernels.flash4_ahead", gpu).count("compiled\n") == 2
