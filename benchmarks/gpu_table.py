"""The table of one GPU for SmolLM2-135M's shape at T 2048: `python -m benchmarks.gpu_table`.

One choice is changed in each line, in the order of what one wants to know first. Cells are trained by a process of
their own (benchmarks/gpu_cells.py); one that hangs or dies costs its own time, and a fresh process does the rest.
"""

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_cells import FAILED, MEASURED, SHIPPED, list_cells
from benchmarks.gpu_task import FULL, RECIPE, TINY, GpuTask
from benchmarks.parts import CODE_CUT, CODE_FAIL, CODE_PASS, end_process_family
from benchmarks.peak import ROOT, Peaks, measure_peaks_once
from smoltrain.config.load import load_config
from smoltrain.estimate.constants import TERA
from smoltrain.estimate.speed import recipe_flops_per_token

CELL_LIMIT_S = 90.0  # compiling included
CUT, NOT_RUN = "cut", "not run"  # what else may become of a cell
HEADS = (
    "cell", "computed with", "tokens/s", "ms a step", "x as shipped", "MFU, data sheet", "MFU, measured peak",
    "GiB", "first step, s", "last loss", "save pause, s", "data wait",
)  # fmt: skip


def run_table(names: Sequence[str], scratch: Path, deadline_s: float, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """What became of each cell, as soon as it is known; those that the time (time.monotonic) misses are "not run"."""
    left = list(names)
    while left and time.monotonic() < deadline_s:
        command = [sys.executable, "-m", "benchmarks.gpu_cells", str(scratch), *left, *(["--tiny"] if tiny else [])]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            for result in read_results(child, tuple(left), deadline_s):
                left.remove(result["cell"])
                yield result
        finally:
            end_process_family(child)
    for name in left:
        yield {"cell": name, "outcome": NOT_RUN, "why": "no time was left"}


def read_results(child: subprocess.Popen[str], names: Sequence[str], deadline_s: float) -> Iterator[dict[str, Any]]:
    """What a process of cells tells; it ends behind the first that failed, or that did not come, which is said."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_queue_lines, args=(child, lines), daemon=True).start()
    for name in names:
        limit_s = max(0.0, min(CELL_LIMIT_S, deadline_s - time.monotonic()))
        try:
            line = lines.get(timeout=limit_s)
        except queue.Empty:
            yield {"cell": name, "outcome": CUT, "why": f"it was not done after {limit_s:.0f} s"}
            return
        if line is None:
            yield {"cell": name, "outcome": FAILED, "why": f"its process ended with code {child.wait()}"}
            return
        result = json.loads(line)
        yield result
        if result["outcome"] == FAILED:
            return


def _queue_lines(child: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]") -> None:
    """The results of a process, and None at its end. Libraries write to its stdout too: their lines are left out."""
    assert child.stdout is not None
    with child.stdout as said:
        for line in said:
            if line.startswith('{"cell"'):
                lines.put(line)
    lines.put(None)


def format_line(
    result: dict[str, Any], task: GpuTask, peaks: Peaks, flops_per_token: float, shipped: float | None
) -> str:
    """A line of the table; `shipped` is tokens/s of what is shipped, if that is known."""
    if result["outcome"] != MEASURED:
        why = str(result["why"]).replace("|", "/")
        return f"| {result['cell']} | {result['outcome']}: {why} |" + " |" * (len(HEADS) - 2)
    tokens_per_s = task.tokens_per_step / result["step_s"]
    flops = tokens_per_s * flops_per_token
    texts = (
        result["cell"],
        result["choices"],
        f"{tokens_per_s:,.0f}",
        f"{1000 * result['step_s']:.1f}",
        "" if shipped is None else f"{tokens_per_s / shipped:.2f}",
        "" if peaks.data_sheet_flops is None else f"{flops / peaks.data_sheet_flops:.1%}",
        f"{flops / peaks.matmul_flops:.1%}",
        f"{result['peak_gib']:.1f}",
        f"{result['first_step_s']:.1f}",
        f"{result['last_loss']:.3f}",
        "" if result["save_pause_s"] is None else f"{result['save_pause_s']:.2f}",
        "" if result["data_wait_share"] is None else f"{result['data_wait_share']:.1%}",
    )
    return f"| {' | '.join(texts)} |"


def describe_peaks(peaks: Peaks) -> str:
    """In a line."""
    measured = f"{peaks.matmul_flops / TERA:,.2f} TFLOP/s of bf16 products, {peaks.copied_bytes_per_s / TERA:.2f} TB/s"
    if peaks.data_sheet_flops is None:
        return f"Measured peaks: {measured}; MFU is of the measured one alone: {peaks.data_sheet}."
    return f"Measured peaks: {measured}; {peaks.data_sheet} says {peaks.data_sheet_flops / TERA:,.0f} TFLOP/s."


def print_table() -> int:
    """The command; its exit code (benchmarks/parts.py)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peaks", type=Path, help="file of measured peaks, made if it is not there")
    arguments = parser.parse_args()
    deadline_s = time.monotonic() + arguments.seconds
    task = TINY if arguments.tiny else FULL
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        task.prepare_rows(scratch / "data")
        flops_per_token = recipe_flops_per_token(load_config(RECIPE, task.overrides(scratch / "data")))
        peaks = measure_peaks_once("bf16", arguments.peaks, task.peak_size)
        print(describe_peaks(peaks))
        print(f"\n| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
        names = [cell.name for cell in list_cells(tiny=arguments.tiny)]
        outcomes: set[str] = set()
        shipped: float | None = None
        for result in run_table(names, scratch, deadline_s, tiny=arguments.tiny):
            if result["cell"] == SHIPPED.name and result["outcome"] == MEASURED:
                shipped = task.tokens_per_step / result["step_s"]
            print(format_line(result, task, peaks, flops_per_token, shipped), flush=True)
            outcomes.add(result["outcome"])
    if FAILED in outcomes or shipped is None:
        return CODE_FAIL
    return CODE_CUT if outcomes & {CUT, NOT_RUN} else CODE_PASS


if __name__ == "__main__":
    sys.exit(print_table())
