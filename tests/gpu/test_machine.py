"""Out of memory and a profile, on a real GPU."""

import sys
from pathlib import Path

import pytest
import torch

from smoltrain.errors import FAULT
from smoltrain.profiling.profile import profile_recipe
from smoltrain.profiling.trace import HOST_GAPS
from tests import preloaded, tiny
from tests.zygote import zygote

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")]


def leave_little_memory(gib: float) -> None:
    """From here on torch gives this process so much of the GPU and no more."""
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


def test_a_gpu_without_memory_ends_in_a_page(tmp_path: Path) -> None:
    too_large = ("batch.sequence_length=64", "batch.micro_batch=64", "batch.accumulation=1", "engine.loss=plain")
    words = tiny.words(tmp_path, *too_large, "model.vocab_size=65536", "engine.gradient_checkpointing=none")
    life = zygote().train(words, 1, tmp_path / "log", leave_little_memory, 1.0)
    assert life.end() == [FAULT]
    assert "Traceback" not in life.text()
    page = (tmp_path / "runs" / "quickstart" / "logs" / "out-of-memory-rank0.txt").read_text()
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate" in page
    assert "of the GPU" in page


def test_the_parts_of_a_gpus_steps_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(preloaded.programs() / "python"))
    monkeypatch.chdir(tmp_path)
    profile = profile_recipe("quickstart", tiny.words(tmp_path), steps=3, ranks=1, trace=None)
    seconds = profile.parts.seconds
    assert profile.parts.uses_gpu
    assert sum(seconds.values()) == pytest.approx(profile.parts.wall_s, rel=1e-9)
    assert {"attention", "MLP", "loss", "backward", "update", HOST_GAPS} <= set(seconds)
