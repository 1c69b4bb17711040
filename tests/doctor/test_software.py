"""What is installed: each fault is a real package, on a path of its own."""

import importlib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from smoltrain.doctor import child, probe, software
from smoltrain.doctor.probe import Probe, TorchFacts
from tests import preloaded, tiny

CPU = TorchFacts("2.13.0+cpu", None, bf16_error=0.002, precision="fp32, as it is so")
GPU = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30, "has_bf16": True}
HOPPER = TorchFacts("2.13.0", "13.0", [GPU, GPU], nccl="2.29.1", bf16_error=0.002)


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def answered(facts: TorchFacts) -> Probe:
    asked = Probe()
    asked._facts = facts
    return asked


def test_packages_outside_of_their_bounds_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.check_packages().status == "ok"
    install(tmp_path, "torch", "2.4.0")
    install(tmp_path, "deepspeed", "0.30.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = software.check_packages()
    assert found.status == "fault"
    assert found.saw == "torch 2.4.0, wanted >=2.11, deepspeed 0.30.0, wanted <0.20,>=0.19.8"


def test_an_extra_outside_of_its_bounds_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flash_attn", "2.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = software.check_packages()
    assert (found.status, found.saw) == ("warning", "flash-attn 2.1, wanted >=2.7")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = software.read_bounds()
    monkeypatch.setattr(software, "read_bounds", lambda: bounds._replace(python=SpecifierSet(">=4.0")))
    assert software.check_python().status == "fault"
    monkeypatch.setattr("sys.path", [])
    importlib.invalidate_caches()
    assert software.check_packages().saw.startswith("not installed: torch, deepspeed, transformers and ")


def test_without_a_checkout_the_bounds_are_those_of_the_installed_package(tmp_path: Path) -> None:
    ours = software.read_bounds()
    installed = software.read_bounds(tmp_path / "none")
    assert installed.python == ours.python
    assert "torch" in [wanted.name for wanted in installed.needed]
    assert "gradio" not in [wanted.name for wanted in installed.needed]


# ---- torch, asked in a process of its own


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of Python are forked from one that has imported torch."""
    monkeypatch.setattr(child, "PYTHON", [str(preloaded.programs() / "python"), "-P"])


@pytest.mark.usefixtures("forked")
def test_torch_is_asked_and_what_it_says_is_right() -> None:
    import torch

    asked = Probe()
    assert software.check_torch(asked).saw.startswith(f"{torch.__version__}, built for ")
    assert software.check_bf16(asked, None).status == "ok"
    assert len(asked.ask().gpus) == torch.cuda.device_count()


def test_a_torch_that_cannot_be_imported_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudnn.so.9: cannot open shared object file')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = software.check_torch(Probe())
    assert found.status == "fault"
    assert "ImportError: libcudnn.so.9: cannot open shared object file" in found.saw


FLASH = {
    "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi')": (
        "warning", "FlashAttention 2 is installed, and not for this torch: flash_attn_2_cuda.so: undefined symbol",
    ),
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": (
        "fault", "importing FlashAttention kills the process (the process was ended by SIGSEGV",
    ),
    "flash_attn_func = flash_attn_varlen_func = None": ("ok", "FlashAttention 2 can be imported"),
}  # fmt: skip


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("code", FLASH)
def test_a_flash_attention_for_another_torch_is_found(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(code)
    monkeypatch.chdir(tmp_path)  # which the forked process puts on its path
    status, said = FLASH[code]
    asked = answered(TorchFacts("2.13.0", None, has_flash=True))
    found = software.check_flash_attention(asked)
    assert (found.status, said in found.saw) == (status, True), found


def test_without_flash_attention_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "start_child", None)
    assert software.check_flash_attention(answered(CPU)).status == "ok"


# ---- GPUs, of which there is none here


@pytest.mark.parametrize(
    ("facts", "files", "overrides", "status", "said"),
    [
        (CPU, (), (), "ok", "no GPU here"),
        (CPU, ("nvidia0",), (), "warning", "1 GPUs of NVIDIA's driver, and a torch for CPUs alone"),
        (CPU, (), ("engine.device=cuda",), "fault", "engine.device=cuda, and no GPU here"),
        (TorchFacts("2.13.0", "13.0", cuda_error="no driver"), (), (), "warning", "a torch for CUDA 13.0, and no GPU:"),
        (TorchFacts("2.13.0", "13.0"), ("nvidia0",), (), "fault", "a torch for CUDA 13.0, and no GPU"),
        (HOPPER, ("nvidia0",), (), "ok", "2 GPUs: NVIDIA H100 (80 GiB), NVIDIA H100 (80 GiB)"),
    ],
)  # fmt: skip
def test_gpus_and_a_torch_that_do_not_fit_each_other(
    facts: TorchFacts, files: tuple[str, ...], overrides: tuple[str, ...], status: str, said: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    found = software.check_cuda(answered(facts), tiny.load(tmp_path, *overrides), tmp_path)
    assert (found.status, found.saw[: len(said)]) == (status, said)


def test_a_precision_that_the_device_lacks_is_told(tmp_path: Path) -> None:
    fp16 = tiny.load(tmp_path, "engine.precision=fp16", "engine.ds_config=zero2_fp16")
    assert software.check_bf16(answered(CPU), fp16).status == "warning"
    old = TorchFacts("2.13.0", "13.0", [GPU | {"has_bf16": False}])
    assert software.check_bf16(answered(old), tiny.load(tmp_path)).status == "fault"
    assert software.check_bf16(answered(TorchFacts("2.13.0", None, bf16_error=0.5)), None).status == "fault"
    assert software.check_bf16(answered(TorchFacts("2.13.0", None, bf16_error=float("nan"))), None).status == "fault"
    assert software.check_nccl(answered(HOPPER)).saw == "2.29.1"


def test_a_gpu_that_is_hot_is_named() -> None:
    lines = "0, 1980, 1980, Not Active, Not Active\n1, 600, 1980, Not Active, Active\n"
    found = software.judge_gpu_clocks(lines)
    assert (found.status, found.saw) == ("warning", "GPU 1 slows down by itself: heat or power")
    assert software.judge_gpu_clocks(lines.splitlines()[0]).status == "ok"
    assert software.check_gpu_clocks(answered(CPU)).status == "ok"
