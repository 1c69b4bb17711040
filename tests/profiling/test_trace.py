"""A trace cut into parts: every microsecond of the steps belongs to one. Events as kineto writes them, made up."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from smoltrain.profiling.trace import HOST_GAPS, RECOMPUTED, find_step_parts, flatten_ranges, read_trace

MAIN = {"pid": 1, "tid": 10}


def event(name: str, began_us: float, ended_us: float, cat: str = "user_annotation", **more: Any) -> dict[str, Any]:
    if cat == "user_annotation":
        name = f"smoltrain: {name}"
    return {"ph": "X", "cat": cat, "name": name, "ts": began_us, "dur": ended_us - began_us, **MAIN, **more}


STEP = [
    event("begin", 0, 10),
    event("data", 10, 30),
    event("forward", 30, 130),
    event("attention", 40, 80),
    event("norms", 50, 60),
    event("loss", 100, 130),
    event("backward", 130, 230),
    event("attention", 150, 170),  # recomputed
    event("reduction", 230, 240),
    event("update", 240, 290),
    event("records", 290, 300),
]


def parts_in_us(events: list[dict[str, Any]]) -> dict[str, float]:
    parts = find_step_parts(events)
    assert sum(parts.seconds.values()) == pytest.approx(parts.wall_s, rel=1e-12)
    assert parts.wall_s == pytest.approx(300e-6)
    return {part: round(1e6 * seconds, 6) for part, seconds in parts.seconds.items()}


def test_the_innermost_range_counts() -> None:
    segments = flatten_ranges(STEP)
    ends = [segment.ended_s for segment in segments]
    assert [segment.began_s for segment in segments[1:]] == ends[:-1], "no gap, no overlap"
    told = [(segment.part, round(1e6 * (segment.ended_s - segment.began_s))) for segment in segments]
    assert told == [
        ("records", 10), ("data", 20), ("forward", 10), ("attention", 10), ("norms", 10), ("attention", 20),
        ("forward", 20), ("loss", 30), ("backward", 20), (RECOMPUTED, 20), ("backward", 60), ("reduction", 10),
        ("update", 50), ("records", 10),
    ]  # fmt: skip


def test_on_a_cpu_python_between_operators_is_a_host_gap() -> None:
    operators = [
        event("aten::mm", 30, 75, "cpu_op"),
        event("aten::mm_inside", 31, 60, "cpu_op"),
        event("aten::cross_entropy", 100, 125, "cpu_op"),
        event("autograd::engine", 130, 230, "cpu_op"),
        event("aten::add_", 245, 290, "cpu_op"),
        event("aten::elsewhere", 0, 300, "cpu_op", tid=11),
        event("aten::before", -50, -20, "cpu_op"),
    ]
    assert parts_in_us([*STEP, *operators]) == {
        "records": 20, "data": 20, "forward": 10, "attention": 25, "norms": 10, "loss": 25, "backward": 80,
        RECOMPUTED: 20, "reduction": 10, "update": 45, HOST_GAPS: 5 + 20 + 5 + 5,
    }  # fmt: skip
    names = [run.name for run in find_step_parts([*STEP, *operators]).operators]
    assert names == ["aten::mm", "aten::cross_entropy", "autograd::engine", "aten::add_"]


def kernel(name: str, began_us: float, ended_us: float, launched_us: float, number: int) -> list[dict[str, Any]]:
    """A launch on the host, and what ran later on the device, in its own process and stream."""
    launch = event("cudaLaunchKernel", launched_us, launched_us + 2, "cuda_runtime", args={"correlation": number})
    ran = event(name, began_us, ended_us, "kernel", pid=0, tid=7, args={"correlation": number, "stream": 7})
    return [launch, ran]


def test_on_a_gpu_a_kernel_belongs_to_where_it_was_launched() -> None:
    events = [
        *STEP,
        event("attention", 180, 190, tid=11),  # recomputed by autograd's thread
        *kernel("flash_fwd", 60, 120, 42, 1),  # of attention, though the host is at the loss when it ends
        *kernel("gemm", 100, 140, 35, 2),  # overlaps: the first one counts until 120
        *kernel("flash_fwd", 190, 200, 185, 3),
        *kernel("ncclDevKernel_ReduceScatter", 200, 235, 232, 4),
        *kernel("adam", 250, 310, 245, 5),  # what goes on after the window is cut
        event("## annotation", 0, 300, "gpu_user_annotation"),
    ]
    assert parts_in_us(events) == {
        "records": 10, "data": 20, "attention": 60, "forward": 20, RECOMPUTED: 10, "reduction": 35, "update": 50,
        HOST_GAPS: 30 + 50 + 15,
    }  # fmt: skip


def test_a_file_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": [*STEP, {"ph": "M", "name": "process_name"}]}, file)
    assert read_trace(path) == STEP
    with pytest.raises(ValueError, match="no step"):
        find_step_parts([event("aten::mm", 0, 1, "cpu_op")])
