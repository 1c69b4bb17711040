"""Running out of memory: which errors mean it, and the page of ranks that really had none left."""

import errno
import re
import resource
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from smoltrain.errors import FAULT
from smoltrain.training import out_of_memory
from smoltrain.training.out_of_memory import explain_out_of_memory, find_asked_bytes, is_out_of_memory
from tests import tiny
from tests.zygote import zygote

MIB = 2**20
# What takes the memory is the logits of a micro-batch, which the recipe's fused loss would never have as a whole.
TOO_LARGE = ("batch.sequence_length=64", "batch.micro_batch=32", "batch.accumulation=1", "engine.loss=plain")
TOO_LARGE += ("engine.gradient_checkpointing=none", "model.vocab_size=32768", "engine.hang_s=0", "evaluate.every=0")


def limit_address_space(more: int) -> None:
    """From here on this process gets so many bytes and no more."""
    data = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (data + more, data + more))


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), 2 * 2**30),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"), 4096),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type int64"),
         7.45 * 2**30),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 256.00 MiB"), 256 * MIB),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 0),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 0),
    ],
)  # fmt: skip
def test_errors_that_mean_it(error: Exception, asked: float) -> None:
    assert is_out_of_memory(error)
    assert find_asked_bytes(str(error)) == asked
    wrapped = RuntimeError("a worker failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def test_errors_that_do_not() -> None:
    for error in (OSError(errno.ENOSPC, "No space left"), RuntimeError("Connection closed by peer"), ValueError("x")):
        assert not is_out_of_memory(error)


@pytest.mark.slow
def test_ranks_that_get_no_more_memory_end_in_a_page(tmp_path: Path) -> None:
    log = tmp_path / "log"
    life = zygote().train(tiny.words(tmp_path, *TOO_LARGE), 2, log, limit_address_space, 400 * MIB)
    codes = life.end()
    said = life.text()
    print(said)
    assert codes == [FAULT, FAULT]
    assert "Traceback" not in said
    assert said.count("memory of rank") == 1, "the first one shows its tables"
    logs = tmp_path / "runs" / "quickstart" / "logs"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    pages = sorted(logs.glob("out-of-memory-rank*.txt"))
    assert pages
    for path in pages:
        rank = path.stem[-1]
        page = path.read_text()
        print(page)
        [error] = [line for line in errors if f"error: rank {rank} on {socket.gethostname()} ran out of memory" in line]
        assert "in step 1, forward" in error
        assert "want at most " in error
        assert "(its RLIMIT_DATA, a ulimit); change " in error
        assert "engine.loss=fused (" in error
        assert error.endswith(str(path))
        assert f"Out of memory: rank {rank} of 2" in page
        assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 bytes" in page
        # 64 x 32 tokens x 32,768 logits: in bf16 they are there, in fp32 they are what was asked for.
        assert re.search(r"other +2048 x 32768 +bfloat16 +1 +0\.125", page)
        assert re.search(r"weights +0\.002 +0\.002", page)
        assert "in step 1, forward" in page


@pytest.mark.slow
def test_the_first_setting_of_the_page_fits(tmp_path: Path) -> None:
    words = tiny.words(tmp_path, *TOO_LARGE, "engine.loss=fused", "run.stop_after=main", "phases.main.steps=1")
    life = zygote().train([*words, "phases.main.warmup_steps=0"], 2, tmp_path / "log", limit_address_space, 400 * MIB)
    assert life.end() == [0, 0], life.text()


def test_a_page_that_cannot_be_made_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start: Any = SimpleNamespace(config=tiny.load(tmp_path), point=SimpleNamespace(step=4), rows_per_step=8)
    world: Any = SimpleNamespace(rank=0, size=1, local_size=1, hosts=("here",), device=torch.device("cpu"))

    def have_no_room(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(out_of_memory, "assess_failure", have_no_room)
    stop = explain_out_of_memory(MemoryError("Unable to allocate 1.00 MiB"), start, world, None)
    assert str(stop).endswith(
        "ran out of memory at its start, before step 5: MemoryError: Unable to allocate 1.00 MiB; its page could not "
        "be made (MemoryError)"
    )
