"""What the loss costs at a recipe's shape: `smoltrain bench loss`. Forward and backward of the vocabulary head alone.

Legend: N tokens of a micro-batch, D width of the residual stream, V vocabulary.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.about import describe_benchmark
from benchmarks.peers import model_depth_and_width
from benchmarks.timing import CallTimes, time_interleaved
from smoltrain import files
from smoltrain.config.load import load_config
from smoltrain.distributed.world import choose_device
from smoltrain.kernels import compile
from smoltrain.kernels.loss import IGNORE_INDEX, PLAIN_LOSS, LossKernel, choose_loss_kernel, summed_cross_entropy
from smoltrain.kernels.precision import DTYPES, choose_precision

MIB = 2**20
REFERENCE = LossKernel("recomputed", "a chunk at a time, in fp32")


@dataclass(frozen=True)
class LossKernelResult:
    """One kernel: its time, the memory it needs beside its inputs, and how far it is from fp32 (relative norms)."""

    timed: CallTimes
    peak_mib: float
    loss_error: float
    hidden_error: float
    weight_error: float


@dataclass(frozen=True)
class LossCase:
    """One micro-batch: what the head is given. Of the labels one in fifty is IGNORED."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor

    def run(self, kernel: LossKernel, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss, and its gradients for the hidden states and the weight."""
        loss = summed_cross_entropy(self.hidden_ND, self.weight_VD, self.labels_N, kernel, z_loss)
        scale = 1 / (self.labels_N != IGNORE_INDEX).sum()  # on the device, as the trainer's
        hidden_gradient, weight_gradient = torch.autograd.grad(loss * scale, (self.hidden_ND, self.weight_VD))
        return loss.detach() * scale, hidden_gradient, weight_gradient

    def to(self, dtype: torch.dtype) -> "LossCase":
        """The same numbers in another dtype."""
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden_ND, self.weight_VD))
        return replace(self, hidden_ND=hidden, weight_VD=weight)


def benchmark_loss(recipe: str, overrides: list[str], rounds: int, out: Path) -> None:
    """Measure, print a table, and write `out` (JSON). Errors: UserError for the recipe."""
    settings = load_config(recipe, overrides)
    out.parent.mkdir(parents=True, exist_ok=True)
    device = choose_device(settings.engine.device)
    precision, _ = choose_precision(settings.engine.precision, device)
    N = settings.batch.micro_batch_rows * settings.batch.sequence_length
    V, (_, D) = settings.model.vocab_size, model_depth_and_width(settings.model)
    case = make_loss_case(N, V, D, DTYPES[precision], device)
    kernels, left_out = _find_runnable_loss_kernels(case)
    rows = measure_loss_kernels(case, kernels, rounds)
    table = Table(
        "", "forward and\nbackward ms", "clean\ncalls", "peak\nMiB", "error against fp32 of the\nloss | gradients"
    )
    for name, row in rows.items():
        errors = f"{row.loss_error:.1e} | {max(row.hidden_error, row.weight_error):.1e}"
        table.add_row(name, f"{row.timed.median_s * 1e3:,.1f}", row.timed.clean, f"{row.peak_mib:,.0f}", errors)
    console = Console(markup=False, highlight=False)
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"{name} was not measured: {reason}")
    console.print(f"{N} tokens x {D} wide x {V} words in {precision} on {device.type}")
    depends = {
        "recipe": recipe, "overrides": overrides, "rounds": rounds, "device": device.type, "precision": precision,
        "tokens": N, "width": D, "vocabulary": V,
    }  # fmt: skip
    measured = {name: asdict(row) for name, row in rows.items()}
    files.write_json_file(out, describe_benchmark(depends, ()) | {"measured": measured, "not_measured": left_out})
    console.print(out)


def make_loss_case(N: int, V: int, D: int, dtype: torch.dtype, device: torch.device) -> LossCase:
    """Hidden states as a norm leaves them, a weight as it is initialized; the same each time."""
    draw = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(N, D, generator=draw), 0.02 * torch.randn(V, D, generator=draw)
    labels_N = torch.randint(V, (N,), generator=draw)
    labels_N[::50] = IGNORE_INDEX
    return LossCase(hidden_ND.to(device), weight_VD.to(device), labels_N.to(device)).to(dtype)


def measure_loss_kernels(case: LossCase, kernels: dict[str, LossKernel], rounds: int) -> dict[str, LossKernelResult]:
    """One row for each kernel; all are timed in turn."""
    device = case.hidden_ND.device
    truth = case.to(torch.float32).run(REFERENCE)
    errors = {
        name: [float((ours.float() - true).norm() / true.norm()) for ours, true in zip(case.run(k), truth, strict=True)]
        for name, k in kernels.items()  # which also compiles what is to be compiled
    }
    peaks = {name: peak_memory_mib(lambda k=k: case.run(k), device) for name, k in kernels.items()}
    times = time_interleaved({name: lambda k=k: case.run(k) for name, k in kernels.items()}, rounds=rounds)
    return {name: LossKernelResult(times[name], peaks[name], *errors[name]) for name in kernels}


def peak_memory_mib(call: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors alive at once during a call, beside those that were alive before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    # Counted by torch at each allocation; a process's size would depend on what malloc kept before.
    with (
        _silence_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled,
    ):
        call()
    assert profiled.profiler is not None
    results: Any = profiled.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most / MIB


def _find_runnable_loss_kernels(case: LossCase) -> tuple[dict[str, LossKernel], dict[str, str]]:
    """What can run here by name, and for what cannot the reason."""
    device, dtype = case.hidden_ND.device, case.hidden_ND.dtype
    left_out = {}
    kernels = {"plain": PLAIN_LOSS}
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needs = 12 * len(case.labels_N) * len(case.weight_VD)  # three times the logits in fp32, in the backward pass
    if needs > free / 2:
        del kernels["plain"]
        left_out["plain"] = f"needs about {needs / 2**30:.0f} of {free / 2**30:.0f} GiB"
    ours = choose_loss_kernel("fused", device, dtype, compiles=False)
    kernels[ours.name] = ours
    if ours.name == "fused":
        if missing := compile.missing_for_compile(device.type):
            left_out["fused, compiled"] = missing
        else:
            kernels["fused, compiled"] = replace(ours, compiles=True)
    auto = choose_loss_kernel("auto", device, dtype, compiles=False)
    if auto.name == "liger":
        kernels["liger"] = auto
    else:
        left_out["liger"] = auto.reason
    return kernels, left_out


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Without what torch's profiler writes to the file descriptor of stderr."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
