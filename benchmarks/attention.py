"""How fast and how exact the attention kernels are at a recipe's shape: `smoltrain bench attention`.

Legend: B batch, T tokens, H query heads, K key-value heads, E width per head.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.about import describe_benchmark
from benchmarks.timing import time_interleaved
from smoltrain import files
from smoltrain.config.load import load_config
from smoltrain.config.schema import ModelSection
from smoltrain.distributed.world import choose_device
from smoltrain.errors import Problem, UserError
from smoltrain.kernels.attention import AttentionKernel, causal_attention, choose_attention_kernel
from smoltrain.kernels.precision import DTYPES, choose_precision
from smoltrain.model.build import decoder_head_width

MATH = AttentionKernel("math", "the definition")


class AttentionCase:
    """Random queries, keys, values and gradient of the output, laid out in memory as a decoder's projections are."""

    def __init__(
        self, section: ModelSection, B: int, T: int, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        H, K = section.num_attention_heads, section.num_key_value_heads
        draws = torch.Generator().manual_seed(seed)
        x_BTHE = (torch.randn(B, T, heads, section.hidden_size // H, generator=draws) for heads in (H, K, K, H))
        *qkv, dout = (x.to(device, dtype).transpose(1, 2) for x in x_BTHE)
        self.qkv, self.dout_BHTE = [x.requires_grad_() for x in qkv], dout
        self.dropout = section.attention_dropout

    def forward_backward(self, kernel: AttentionKernel, dropout: float) -> list[Tensor]:
        """Output and the gradients of q, k and v."""
        q, k, v = self.qkv
        out = causal_attention(q, k, v, kernel, dropout=dropout)
        return [out.detach(), *torch.autograd.grad(out, self.qkv, self.dout_BHTE)]

    def fp64_reference(self) -> list[Tensor]:
        """The same of the first row, computed in fp64 and without dropout."""
        q, k, v = (x[:1].detach().double().requires_grad_() for x in self.qkv)
        out = causal_attention(q, k, v, MATH)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.dout_BHTE[:1].double())]


def benchmark_attention(recipe: str, overrides: list[str], rounds: int, out: Path) -> None:
    """Measure, print a table, and write `out` (JSON).

    Errors: UserError for the recipe, or where its model is one of transformers.
    """
    settings = load_config(recipe, overrides)
    if not isinstance(settings.model, ModelSection):
        want = "a recipe with a decoder of smoltrain"
        raise UserError(Problem("only our own attention is measured", settings.run.name, want, "model.kind"))
    out.parent.mkdir(parents=True, exist_ok=True)
    device = choose_device(settings.engine.device)
    precision, _ = choose_precision(settings.engine.precision, device)
    B, T = settings.batch.micro_batch_rows, settings.batch.sequence_length
    case = AttentionCase(settings.model, B, T, device, DTYPES[precision], settings.run.seed)
    kernels = find_runnable_kernels(settings.model, device, DTYPES[precision])
    truth = case.fp64_reference()
    found = {name: relative_errors(case, kernel, truth) for name, kernel in kernels.items()}
    timed = time_interleaved(
        {name: lambda kernel=kernel: case.forward_backward(kernel, case.dropout) for name, kernel in kernels.items()},
        rounds=rounds,
    )
    table = Table("", "forward and\nbackward, ms", "clean\ncalls", "error of\nthe output", "of the gradients\nq, k, v")
    auto = choose_attention_kernel("auto", device, DTYPES[precision], **kernel_requirements(settings.model)).name
    for name, took in timed.items():
        output, *gradients = (f"{error:.1e}" for error in found[name])
        marked = f"{name} (auto)" if kernels[name].name == auto else name
        table.add_row(marked, f"{1000 * took.median_s:.2f}", took.clean, output, " ".join(gradients))
    console = Console(markup=False, highlight=False)
    console.print(table)
    words = f"{precision}, B {B}, T {T}; errors: the difference to fp64, norm over norm, of one row without dropout"
    console.print(words, soft_wrap=True)
    measured = {name: asdict(took) | {"errors": found[name]} for name, took in timed.items()}
    depends = {
        "recipe": recipe, "overrides": overrides, "device": str(device), "precision": precision,
        "threads": torch.get_num_threads(), "rounds": rounds,
    }  # fmt: skip
    files.write_json_file(out, describe_benchmark(depends, ()) | {"measured": measured})
    console.print(out)


def kernel_requirements(section: ModelSection) -> dict[str, Any]:
    """What `choose` wants to know of a decoder."""
    return {"dropout": section.attention_dropout, "head_width": decoder_head_width(section)}


def find_runnable_kernels(
    section: ModelSection, device: torch.device, dtype: torch.dtype
) -> dict[str, AttentionKernel]:
    """The kernels that can run here, by the words that a recipe has for them."""
    kernels: dict[str, AttentionKernel] = {}
    for name in ("math", "sdpa", "blocked", "flash"):
        with contextlib.suppress(UserError):
            kernels[name] = choose_attention_kernel(name, device, dtype, **kernel_requirements(section))
    return kernels


def relative_errors(case: AttentionCase, kernel: AttentionKernel, truth: list[Tensor]) -> list[float]:
    """Of output, dq, dk and dv: the norm of the difference to `case.truth()`, over the norm."""
    ours = case.forward_backward(kernel, 0.0)
    return [float((x[:1] - y).norm() / y.norm()) for x, y in zip(ours, truth, strict=True)]
