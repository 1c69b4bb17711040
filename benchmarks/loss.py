"""What the loss costs at a recipe's shape, forward and backward of the head alone: `python -m benchmarks.loss`.

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
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import OUT, OutOption, RoundsOption, make_app, make_console, write_result
from benchmarks.timing import CallTimes, relative_error, time_interleaved
from smoltrain.cli import OverridesArgument, RecipeArgument, run_app
from smoltrain.config.load import load_config
from smoltrain.distributed.world import choose_device
from smoltrain.estimate.training_setup import model_shape
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
    """One micro-batch: what the head is given. Of the labels one in fifty is IGNORE_INDEX."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor

    def forward_backward(self, kernel: LossKernel, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss, and its gradients for the hidden states and the weight."""
        loss = summed_cross_entropy(self.hidden_ND, self.weight_VD, self.labels_N, kernel, z_loss)
        scale = 1 / (self.labels_N != IGNORE_INDEX).sum()  # on the device, as the trainer's
        hidden_gradient, weight_gradient = torch.autograd.grad(loss * scale, (self.hidden_ND, self.weight_VD))
        return loss.detach() * scale, hidden_gradient, weight_gradient

    def to(self, dtype: torch.dtype) -> "LossCase":
        """The same numbers in another dtype."""
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden_ND, self.weight_VD))
        return replace(self, hidden_ND=hidden, weight_VD=weight)


def benchmark_loss(
    recipe: RecipeArgument, overrides: OverridesArgument = None, rounds: RoundsOption = 10, out: OutOption = OUT
) -> None:
    """Measure the loss kernels at a recipe's shape: forward and backward, memory, and the error against fp32.

    Errors: UserError for the recipe.
    """
    config = load_config(recipe, overrides or [])
    out.parent.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.engine.device)
    precision, _ = choose_precision(config.engine.precision, device)
    N = config.batch.micro_batch_rows * config.batch.sequence_length
    V, D = config.model.vocab_size, model_shape(config.model).width
    case = make_loss_case(N, V, D, DTYPES[precision], device)
    kernels, left_out = _find_runnable_loss_kernels(case)
    results = measure_loss_kernels(case, kernels, rounds)
    table = Table(
        "", "forward and\nbackward ms", "clean\ncalls", "peak\nMiB", "error against fp32 of the\nloss | gradients"
    )
    for name, result in results.items():
        errors = f"{result.loss_error:.1e} | {max(result.hidden_error, result.weight_error):.1e}"
        timed = result.timed
        table.add_row(name, f"{timed.median_s * 1e3:,.1f}", timed.clean, f"{result.peak_mib:,.0f}", errors)
    console = make_console()
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"{name} was not measured: {reason}")
    console.print(f"{N} tokens x {D} wide x {V} words in {precision} on {device.type}")
    settings = {
        "recipe": recipe, "overrides": overrides or [], "rounds": rounds, "device": device.type,
        "precision": precision, "tokens": N, "width": D, "vocabulary": V,
    }  # fmt: skip
    measured = {name: asdict(result) for name, result in results.items()}
    write_result(out, settings, (), {"measured": measured, "not_measured": left_out})


def make_loss_case(N: int, V: int, D: int, dtype: torch.dtype, device: torch.device) -> LossCase:
    """Hidden states as a norm leaves them, a weight as it is initialized; the same each time."""
    draw = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(N, D, generator=draw), 0.02 * torch.randn(V, D, generator=draw)
    labels_N = torch.randint(V, (N,), generator=draw)
    labels_N[::50] = IGNORE_INDEX
    return LossCase(hidden_ND.to(device), weight_VD.to(device), labels_N.to(device)).to(dtype)


def measure_loss_kernels(case: LossCase, kernels: dict[str, LossKernel], rounds: int) -> dict[str, LossKernelResult]:
    """One result for each kernel; all are timed in turn."""
    device = case.hidden_ND.device
    reference = case.to(torch.float32).forward_backward(REFERENCE)
    errors: dict[str, list[float]] = {}
    for name, kernel in kernels.items():  # which also compiles what is to be compiled
        ours = case.forward_backward(kernel)
        errors[name] = [relative_error(x, truth) for x, truth in zip(ours, reference, strict=True)]
    calls = {name: lambda kernel=kernel: case.forward_backward(kernel) for name, kernel in kernels.items()}
    peaks = {name: peak_memory_mib(call, device) for name, call in calls.items()}
    times = time_interleaved(calls, rounds=rounds)
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


app = make_app(benchmark_loss, "smollm2-135m batch.micro_batch=8")

if __name__ == "__main__":
    run_app(app)
