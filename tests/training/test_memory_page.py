"""The page about memory: what is known stands in it, and nothing that is not."""

import datetime
from dataclasses import replace
from pathlib import Path

from smoltrain.distributed.memory_limits import MemoryLimit
from smoltrain.engine.held_tensors import HeldTensors
from smoltrain.estimate.constants import GIB, GPUS
from smoltrain.estimate.report import Estimate
from smoltrain.estimate.smaller_settings import SmallerSetting
from smoltrain.training.memory_page import (
    NUM_TENSORS,
    MemoryFailure,
    describe_failure,
    format_page,
    format_tables,
    write_page,
)
from tests.estimate.setups import make_setup

FAILURE = MemoryFailure(
    rank=1, num_ranks=2, host="node7", where="in step 3, forward", what="OutOfMemoryError: CUDA out of memory.",
    limit=MemoryLimit(8 * GIB, "all memory of this GPU"), asked=2 * GIB, held=7 * GIB,
    held_parts={"weights": 1 * GIB, "optimizer": 3 * GIB, "gradients": 0.5 * GIB},
    tensors=[HeldTensors("weights", (3, 4), "bfloat16", 2, GIB)] * (NUM_TENSORS + 2), notes=("a note",),
    estimate=Estimate(make_setup(), GPUS["l4"]),
    settings=(SmallerSetting(("batch.micro_batch=1",), 6 * GIB, 0.003), SmallerSetting(("x=1", "y=2"), GIB, 0.25)),
    speeds="NVIDIA L4", advice="a smaller model",
)  # fmt: skip
NOW = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)


def test_the_line() -> None:
    assert str(describe_failure(FAILURE, Path("logs/page.txt"))) == (
        "rank 1 on node7 ran out of memory in step 3, forward: saw 7.00 GiB held and 2.00 GiB more asked for, want at "
        "most 8.00 GiB (all memory of this GPU); change batch.micro_batch=1 (as fast), or x=1 y=2 (+25% time); the "
        "page is logs/page.txt"
    )
    killed = replace(FAILURE, held=None, asked=0.0, settings=())
    assert "saw memory used up, want at most 8.00 GiB (all memory of this GPU); change a smaller model; the" in str(
        describe_failure(killed, Path("page"))
    )


def test_the_tables_for_the_console() -> None:
    rows = [line.split() for line in format_tables(FAILURE).splitlines()]
    assert FAILURE.estimate is not None
    assert ["weights", f"{FAILURE.estimate.memory['weights'] / GIB:.3f}", "1.000"] in rows
    rest = next(row for row in rows if row[0] == "activations,")
    assert rest[-1] == "2.500", "7 in all, less 1, 3 and 0.5"
    assert ["asked", "for", "on", "top", "2.000"] in rows
    assert ["x=1", "y=2", "1.000", "+25%", "time"] in rows


def test_the_whole_page(tmp_path: Path) -> None:
    page = format_page(FAILURE, NOW)
    assert page.startswith("Out of memory: rank 1 of 2 on node7, in step 3, forward\nat 2026-11-30 12:00:00 +0000\n")
    assert "what failed: OutOfMemoryError: CUDA out of memory.\nthe limit: 8.00 GiB, all memory of this GPU\n" in page
    needed = 9 - FAILURE.estimate.memory.total / GIB if FAILURE.estimate else 0
    assert f"At least {needed:.2f} GiB more was needed than estimated" in page
    assert "time is estimated by the speed of NVIDIA L4" in page
    assert page.count("3 x 4") == NUM_TENSORS
    assert "2 more kinds of tensors have 2.00 GiB together." in page
    assert write_page(FAILURE, tmp_path / "logs").name == "out-of-memory-rank1.txt"


def test_what_nobody_knows_is_not_told() -> None:
    bare = replace(FAILURE, held=None, held_parts={}, tensors=(), estimate=None, settings=(), asked=0.0)
    page = format_page(bare, NOW)
    assert "No estimate" in page
    assert "What to change: a smaller model." in page
    assert "largest tensors" not in page
    assert "GiB more" not in page
    assert not any(character.isdigit() for line in format_tables(bare).splitlines()[2:] for character in line)
