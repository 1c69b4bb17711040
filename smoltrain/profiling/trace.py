"""A Chrome trace of whole steps, cut into parts that add up to them. Pure functions of the trace's events.

The host's time is cut by the ranges that training/step_recorder.py makes: one after the other, with those of layers
inside, of which the innermost counts. What is cut further depends on who computes:

on a CPU    the host itself. Where it computes, but no operation of torch runs, Python does: a host gap.
on a GPU    the device. Each kernel belongs to the range in which the host launched it, wherever it runs; of several at
            a time the first one counts. When none runs the GPU has nothing to do: what the host does then is the part,
            if it waits (for rows, for other ranks, for files), else it is a host gap.

So every microsecond between the first range and the end of the last one belongs to one part. Format: "Trace Event
Format" (Google), with the categories and arguments of kineto (libkineto/src/output_json.cpp): ts and dur in
microseconds; a launch in the category cuda_runtime or cuda_driver and its kernel have the same `correlation`.
"""

import bisect
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltrain.kernels.loss import LOSS_RANGE, RANGE_PREFIX
from smoltrain.profiling.kernel_times import KernelRun
from smoltrain.training.step_recorder import OTHER_RANKS

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
HOST_GAPS = "host gaps"
RECOMPUTED = "recomputed forward"
LAYERS = ("embedding", "attention", "MLP", "norms", LOSS_RANGE)
LAYER_RANGES = tuple(RANGE_PREFIX + layer for layer in LAYERS)
COMPUTING = (*LAYERS, "forward", "backward", RECOMPUTED, "update", "gradients")  # where Python between two is a gap


@dataclass(frozen=True)
class Segment:
    """A stretch of time that belongs to one part: seconds of the trace's clock."""

    began_s: float
    ended_s: float
    part: str


@dataclass(frozen=True)
class StepParts:
    """Where the time of the recorded steps went, seconds of all of them together."""

    seconds: Mapping[str, float]  # by part
    wall_s: float  # what they add up to
    operators: Sequence[KernelRun]  # a GPU's kernels; on a CPU the operations that no other one contains
    uses_gpu: bool


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events that last of a trace in gzip."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def find_step_parts(events: Sequence[Mapping[str, Any]]) -> StepParts:
    """Cut the recorded steps into parts. Errors: ValueError for a trace without them."""
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(RANGE_PREFIX)]
    if not ranges:
        raise ValueError("the trace has no step")
    first = min(ranges, key=lambda event: event["ts"])
    thread = (first["pid"], first["tid"])
    # Recomputation may run in a thread of autograd's, whose ranges belong to what the main thread waits for.
    own = [event for event in ranges if (event["pid"], event["tid"]) == thread]
    segments = flatten_ranges(own)
    window = (segments[0].began_s, segments[-1].ended_s)
    kernels = [event for event in events if event.get("cat") in ON_DEVICE]
    if kernels:
        runs = _attribute_kernels(kernels, events, segments)
        shown = _cut_by_device(runs, segments)
        operators = [run for run, _ in runs]
    else:
        operators = _find_outermost(
            event for event in events if event.get("cat") == "cpu_op" and (event["pid"], event["tid"]) == thread
        )
        operators = [run for run in operators if run.began_s >= window[0] and run.ended_s <= window[1]]
        shown = _cut_by_operators(operators, segments)
    seconds: dict[str, float] = {}
    for segment in shown:
        seconds[segment.part] = seconds.get(segment.part, 0.0) + segment.ended_s - segment.began_s
    return StepParts(seconds, window[1] - window[0], operators, bool(kernels))


def flatten_ranges(ranges: Iterable[Mapping[str, Any]]) -> list[Segment]:
    """The ranges of one thread, which nest, as segments without a gap: of each moment the innermost range.

    A layer inside of backward is one that is recomputed.
    """
    spans = sorted((e["ts"] / 1e6, -(e["ts"] + e["dur"]) / 1e6, e["name"].removeprefix(RANGE_PREFIX)) for e in ranges)
    segments: list[Segment] = []
    open_ranges: list[tuple[float, str]] = []  # (end, part), the innermost one last
    now_s = spans[0][0]

    def advance(until_s: float) -> None:
        nonlocal now_s
        while now_s < until_s:
            while open_ranges and open_ranges[-1][0] <= now_s:
                open_ranges.pop()
            part = _name_part([name for _, name in open_ranges])
            ends_s = min(until_s, open_ranges[-1][0]) if open_ranges else until_s
            segments.append(Segment(now_s, ends_s, part))
            now_s = ends_s

    for began_s, minus_end_s, name in spans:
        advance(began_s)
        while open_ranges and open_ranges[-1][0] <= now_s:
            open_ranges.pop()
        outer_end_s = open_ranges[-1][0] if open_ranges else -minus_end_s
        open_ranges.append((min(-minus_end_s, outer_end_s), name))
    advance(max(end_s for end_s, _ in open_ranges))
    return segments


def _name_part(names: Sequence[str]) -> str:
    """Of the open ranges from the outermost to the innermost."""
    if not names:
        return HOST_GAPS
    if "backward" in names[:-1] and names[-1] in LAYERS:
        return RECOMPUTED
    return "records" if names[-1] == "begin" else names[-1]


def _find_outermost(events: Iterable[Mapping[str, Any]]) -> list[KernelRun]:
    """Operations of one thread that lie in no other one, in order."""
    found: list[KernelRun] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        began_s = event["ts"] / 1e6
        if not found or began_s >= found[-1].ended_s:
            found.append(KernelRun(event["name"], began_s, began_s + event["dur"] / 1e6))
    return found


def _cut_by_operators(operators: Sequence[KernelRun], segments: Sequence[Segment]) -> list[Segment]:
    """The segments, with host gaps where the host should compute and no operation runs."""
    shown: list[Segment] = []
    ends = [run.ended_s for run in operators]
    for segment in segments:
        if segment.part not in COMPUTING:
            shown.append(segment)
            continue
        now_s = segment.began_s
        for index in range(bisect.bisect_right(ends, segment.began_s), len(operators)):
            run = operators[index]
            if run.began_s >= segment.ended_s:
                break
            if run.began_s > now_s:
                shown.append(Segment(now_s, run.began_s, HOST_GAPS))
                now_s = run.began_s
            until_s = min(run.ended_s, segment.ended_s)
            shown.append(Segment(now_s, until_s, segment.part))
            now_s = until_s
        if now_s < segment.ended_s:
            shown.append(Segment(now_s, segment.ended_s, HOST_GAPS))
    return shown


def _attribute_kernels(
    kernels: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]], segments: Sequence[Segment]
) -> list[tuple[KernelRun, str]]:
    """Each with the part in which the host launched it, in order."""
    launched_s = {
        event["args"]["correlation"]: event["ts"] / 1e6
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    starts = [segment.began_s for segment in segments]
    layers = _find_outermost(
        event for event in events if event.get("cat") == "user_annotation" and event["name"] in LAYER_RANGES
    )  # of any thread: on a GPU those of autograd run the backward pass
    layer_starts = [run.began_s for run in layers]
    runs: list[tuple[KernelRun, str]] = []
    for event in kernels:
        began_s = event["ts"] / 1e6
        asked_s = launched_s.get(event.get("args", {}).get("correlation"), began_s)
        part = segments[max(0, bisect.bisect_right(starts, asked_s) - 1)].part
        index = bisect.bisect_right(layer_starts, asked_s) - 1
        if part == "backward" and index >= 0 and asked_s < layers[index].ended_s:
            part = RECOMPUTED
        if "nccl" in event["name"].lower():
            part = "reduction"
        runs.append((KernelRun(event["name"], began_s, began_s + event["dur"] / 1e6), part))
    return sorted(runs, key=lambda pair: pair[0].began_s)


def _cut_by_device(runs: Sequence[tuple[KernelRun, str]], segments: Sequence[Segment]) -> list[Segment]:
    """The time of all segments by what the device did, and by what the host did where that was nothing."""
    ends_s = segments[-1].ended_s
    now_s = segments[0].began_s
    shown: list[Segment] = []
    for run, part in runs:
        began_s = min(max(run.began_s, now_s), ends_s)
        shown += _idle_segments(segments, now_s, began_s)
        until_s = min(max(run.ended_s, began_s), ends_s)
        shown.append(Segment(began_s, until_s, part))
        now_s = max(now_s, until_s)
    return [*shown, *_idle_segments(segments, now_s, ends_s)]


def _idle_segments(segments: Sequence[Segment], began_s: float, ended_s: float) -> list[Segment]:
    """What the host does meanwhile: waits are parts of their own, all else is a host gap."""
    idle: list[Segment] = []
    first = bisect.bisect_right(segments, began_s, key=lambda segment: segment.ended_s)
    for segment in segments[first:]:
        if segment.began_s >= ended_s:
            break
        first_s = max(segment.began_s, began_s)
        last_s = min(segment.ended_s, ended_s)
        if last_s > first_s:
            part = segment.part if segment.part in ("data", OTHER_RANKS, "records") else HOST_GAPS
            idle.append(Segment(first_s, last_s, part))
    return idle
