"""Running out of memory: which errors mean it, and the page of ranks that really had none left."""

import errno
import resource
from pathlib import Path

import psutil
import pytest
import torch

from smoltrain.errors import FAULT
from smoltrain.train.out_of_memory import find_asked_bytes, is_out_of_memory
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
    page = (tmp_path / "runs" / "quickstart" / "logs" / "out-of-memory-rank0.txt").read_text()
    print(page)
    assert "Traceback" not in said
