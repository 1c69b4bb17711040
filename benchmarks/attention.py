"""How fast and how exact the attention kernels are at a recipe's shape: `python -m benchmarks.attention`.

Legend: B batch, T tokens, H query heads, K key-value heads, E width per head.
"""

import contextlib
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.command import OUT, OutOption, RoundsOption, make_app, make_console, write_result
from benchmarks.timing import relative_error, time_interleaved
from smoltrain.cli import OverridesArgument, RecipeArgument, run_app
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
        E = section.hidden_size // H
        draws = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> Tensor:
            x_BTHE = torch.randn(B, T, heads, E, generator=draws)
            return x_BTHE.to(device, dtype).transpose(1, 2)

        self.qkv = [draw(heads).requires_grad_() for heads in (H, K, K)]
        self.dout_BHTE = draw(H)
        self.dropout = section.attention_dropout

    def forward_backward(self, kernel: AttentionKernel, dropout: float) -> list[Tensor]:
        """Output and the gradients of q, k and v."""
        q, k, v = self.qkv
        out = causal_attention(q, k, v, kernel, dropout=dropout)
        return [out.detach(), *torch.autograd.grad(out, self.qkv, self.dout_BHTE)]

    def fp64_reference(self) -> list[Tensor]:
        """Output and gradients of the first row, computed in fp64 and without dropout."""
        q, k, v = (x[:1].detach().double().requires_grad_() for x in self.qkv)
        out = causal_attention(q, k, v, MATH)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.dout_BHTE[:1].double())]


def benchmark_attention(
    recipe: RecipeArgument, overrides: OverridesArgument = None, rounds: RoundsOption = 10, out: OutOption = OUT
) -> None:
    """Measure the attention kernels at a recipe's shape: forward and backward, and the error against fp64.

    Errors: UserError for the recipe, or where its model is one of transformers.
    """
    config = load_config(recipe, overrides or [])
    section = config.model
    if not isinstance(section, ModelSection):
        want = "a recipe with a decoder of smoltrain"
        raise UserError(Problem("only our own attention is measured", config.run.name, want, "model.kind"))
    out.parent.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.engine.device)
    precision, _ = choose_precision(config.engine.precision, device)
    dtype = DTYPES[precision]
    B, T = config.batch.micro_batch_rows, config.batch.sequence_length
    case = AttentionCase(section, B, T, device, dtype, config.run.seed)
    kernels = find_runnable_kernels(section, device, dtype)
    reference = case.fp64_reference()
    errors = {name: relative_errors(case, kernel, reference) for name, kernel in kernels.items()}
    times = time_interleaved(
        {name: lambda kernel=kernel: case.forward_backward(kernel, case.dropout) for name, kernel in kernels.items()},
        rounds=rounds,
    )
    table = Table("", "forward and\nbackward, ms", "clean\ncalls", "error of\nthe output", "of the gradients\nq, k, v")
    auto = choose_attention_kernel("auto", device, dtype, **kernel_requirements(section)).name
    for name, took in times.items():
        output, *gradients = (f"{error:.1e}" for error in errors[name])
        marked = f"{name} (auto)" if kernels[name].name == auto else name
        table.add_row(marked, f"{1000 * took.median_s:.2f}", took.clean, output, " ".join(gradients))
    console = make_console()
    console.print(table)
    words = f"{precision}, B {B}, T {T}; errors: the difference to fp64, norm over norm, of one row without dropout"
    console.print(words, soft_wrap=True)
    settings = {
        "recipe": recipe, "overrides": overrides or [], "device": str(device), "precision": precision,
        "threads": torch.get_num_threads(), "rounds": rounds,
    }  # fmt: skip
    measured = {name: asdict(took) | {"errors": errors[name]} for name, took in times.items()}
    write_result(out, settings, (), {"measured": measured})


def kernel_requirements(section: ModelSection) -> dict[str, Any]:
    """What choose_attention_kernel asks of a decoder."""
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


def relative_errors(case: AttentionCase, kernel: AttentionKernel, reference: list[Tensor]) -> list[float]:
    """Of output, dq, dk and dv of the first row, against case.fp64_reference()."""
    ours = case.forward_backward(kernel, dropout=0.0)
    return [relative_error(x[:1], truth) for x, truth in zip(ours, reference, strict=True)]


app = make_app(benchmark_attention, "smollm2-135m batch.sequence_length=1024")

if __name__ == "__main__":
    run_app(app)
