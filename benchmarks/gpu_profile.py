"""One step under torch's profiler, beside what the roofline says of it: `python -m benchmarks.gpu_profile`.

Which kernels take the time, how many are launched, how long the device has nothing to do; of each kind of work, how
far it is from the least time that this device needs for it.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_task import FULL, RECIPE, TINY, GpuTask, train_task
from benchmarks.parts import CODE_FAIL, CODE_PASS
from benchmarks.peak import Peaks, measure_peaks_once
from benchmarks.roofline import ATTENTION, ELEMENTWISE, PRODUCTS, UPDATE, list_roofline_parts, sum_by_kind
from smoltrain.config.load import load_config
from smoltrain.config.schema import ModelSection
from smoltrain.profiling.kernel_times import KernelRun, sum_by_kernel

NUM_TOP = 20
GAP_S = 10e-6  # shorter pauses are those between any two kernels
COPIES = "copies and fills"
# Of a kernel's name, the first that fits: attention's kernels are products too.
KINDS = (
    (ATTENTION, re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)),
    (PRODUCTS, re.compile(r"gemm|cutlass|cublas|nvjet|xmma|triton_tem|^aten::(addmm|mm|bmm)$", re.IGNORECASE)),
    (UPDATE, re.compile(r"adam|multi_tensor|lpnorm|reduce_scatter|all_?gather|nccl", re.IGNORECASE)),
    (COPIES, re.compile(r"^mem(cpy|set)", re.IGNORECASE)),
    (ELEMENTWISE, re.compile("")),
)


class StepProfiler:
    """A callback that profiles the one step behind `after`."""

    def __init__(self, after: int) -> None:
        activities = [ProfilerActivity.CPU]
        self._on_cuda = torch.cuda.is_available()
        if self._on_cuda:
            activities.append(ProfilerActivity.CUDA)
        self._after = after
        self.profile = profile(activities=activities, acc_events=True)  # without it torch 2.11 warns at every start

    def __call__(self, step: int, _metrics: dict) -> None:
        """Called by the trainer behind each step."""
        if step not in (self._after, self._after + 1):
            return
        if self._on_cuda:
            torch.cuda.synchronize()
        if step == self._after:
            self.profile.start()
        else:
            self.profile.stop()


def list_kernel_runs(events: Sequence[Any]) -> list[KernelRun]:
    """Of a profile's events, those of the device; on a CPU, whose own events nest, there are none."""
    runs: list[KernelRun] = []
    for event in events:
        is_annotation = getattr(event, "is_user_annotation", False)  # a range that spans kernels
        if event.device_type == DeviceType.CUDA and not is_annotation:
            span = event.time_range
            runs.append(KernelRun(event.name, span.start / 1e6, span.end / 1e6))
    return runs


def list_operator_times(averages: Sequence[Any]) -> list[tuple[str, int, float]]:
    """On a CPU: (operator, calls, seconds without the operators that it calls), the longest first."""
    times = [(average.key, average.count, average.self_cpu_time_total / 1e6) for average in averages]
    return sorted(times, key=lambda time: -time[2])


def find_kind(kernel: str) -> str:
    """Of work, by a kernel's name; Triton's say what they compute in theirs."""
    return next(kind for kind, pattern in KINDS if pattern.search(kernel))


def format_kinds(times: Sequence[tuple[str, int, float]], least_s: dict[str, float]) -> list[str]:
    """A table: for each kind of work what it took, and what the roofline says of it."""
    lines = ["| work | launches | ms | least ms | share of the roofline |", "|---|---|---|---|---|"]
    for kind in (*least_s, COPIES):
        launches = sum(count for name, count, _ in times if find_kind(name) == kind)
        took_s = sum(seconds for name, _, seconds in times if find_kind(name) == kind)
        least = least_s.get(kind)
        told = "" if least is None else f"{1000 * least:.2f}"
        share = "" if least is None or not took_s else f"{least / took_s:.0%}"
        lines.append(f"| {kind} | {launches:,} | {1000 * took_s:.2f} | {told} | {share} |")
    return lines


def format_top(times: Sequence[tuple[str, int, float]]) -> list[str]:
    """A table of the kernels that take the most time."""
    total_s = sum(seconds for _, _, seconds in times)
    lines = ["| kernel | launches | ms | share |", "|---|---|---|---|"]
    for name, launches, seconds in times[:NUM_TOP]:
        short = name.replace("|", "/")[:100]
        lines.append(f"| `{short}` | {launches:,} | {1000 * seconds:.2f} | {seconds / total_s:.1%} |")
    return lines


@dataclass(frozen=True)
class DeviceTimeline:
    """What a device did between the first kernel and the last one."""

    span_s: float
    busy_s: float
    gaps_s: list[float]  # those longer than GAP_S, the longest first


def find_timeline(runs: Sequence[KernelRun]) -> DeviceTimeline:
    """Kernels of several streams may overlap: what any of them does is no gap."""
    ordered = sorted(runs, key=lambda run: run.began_s)
    busy_s = 0.0
    gaps_s: list[float] = []
    done_s = ordered[0].began_s
    for run in ordered:
        gap_s = run.began_s - done_s
        if gap_s > GAP_S:
            gaps_s.append(gap_s)
        busy_s += max(0.0, run.ended_s - max(run.began_s, done_s))
        done_s = max(done_s, run.ended_s)
    return DeviceTimeline(done_s - ordered[0].began_s, busy_s, sorted(gaps_s, reverse=True))


def describe_profile(task: GpuTask, section: ModelSection, profiled: Any, step_s: float, peaks: Peaks) -> list[str]:
    """All of it, in Markdown."""
    accumulation = task.rows_per_step // task.micro_batch
    tokens = task.micro_batch * task.sequence_length
    parts = list_roofline_parts(section, tokens, accumulation, task.sequence_length)
    least_s = sum_by_kind(parts, peaks.matmul_flops, peaks.copied_bytes_per_s)
    whole = f"{1000 * sum(least_s.values()):.1f} ms at the measured peaks"
    lines = [f"A step takes {1000 * step_s:.1f} ms; the least that this device needs for it is {whole}."]
    runs = list_kernel_runs(profiled.events())
    if runs:
        timeline = find_timeline(runs)
        idle_s = timeline.span_s - timeline.busy_s
        longest = ", ".join(f"{1000 * gap_s:.2f}" for gap_s in timeline.gaps_s[:5]) or "none"
        lines.append(
            f"Profiled: {len(runs):,} kernels and copies in {1000 * timeline.span_s:.1f} ms, of which the device had "
            f"nothing to do for {1000 * idle_s:.1f} ms; {len(timeline.gaps_s):,} gaps of more than "
            f"{1e6 * GAP_S:.0f} us, the longest (ms): {longest}."
        )
        times = sum_by_kernel(runs)
    else:
        lines.append("No kernels of a GPU: these are a CPU's operators, which have no gaps.")
        times = list_operator_times(profiled.key_averages())
    return [*lines, "", *format_kinds(times, least_s), "", *format_top(times)]


def print_profile() -> int:
    """The command; its exit code (benchmarks/parts.py)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peaks", type=Path, help="file of measured peaks, made if it is not there")
    arguments = parser.parse_args()
    task = TINY if arguments.tiny else FULL
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        task.prepare_rows(scratch / "data")
        section = load_config(RECIPE, task.overrides(scratch / "data")).model
        assert isinstance(section, ModelSection)
        peaks = measure_peaks_once("bf16", arguments.peaks, task.peak_size)
        profiler = StepProfiler(task.warm_up - 1)  # the last step that does not count: a profiler slows it down
        measured = train_task(task, (), scratch / "data", scratch / "profiled", [profiler])
        lines = describe_profile(task, section, profiler.profile, measured.step_s, peaks)
    print("\n".join(lines), flush=True)
    return CODE_PASS if len(lines) > NUM_TOP else CODE_FAIL


if __name__ == "__main__":
    sys.exit(print_profile())
