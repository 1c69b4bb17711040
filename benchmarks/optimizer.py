"""What an update costs by AdamW and by Muon at a recipe's shape, beside a step: `python -m benchmarks.optimizer`.

Muon blends each gradient with its momentum, orthogonalises the blend of each hidden matrix, and applies it; what is
no hidden matrix is AdamW's. Forward and backward of one micro-batch are measured in turn with the parts of the update,
and scaled to the tokens of a step: its products grow with the tokens, an update does not.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.command import OUT, OutOption, RoundsOption, make_app, make_console, write_result
from benchmarks.timing import CallTimes, time_interleaved
from smoltrain.cli import OverridesArgument, RecipeArgument, run_app
from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.distributed.world import choose_device
from smoltrain.engine.adamw import adamw_step
from smoltrain.engine.hidden_matrices import count_elements, split_parameters
from smoltrain.engine.muon import apply_update, blend_momentum
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.constants import TERA
from smoltrain.estimate.speed import recipe_flops_per_token
from smoltrain.kernels import compile
from smoltrain.kernels.newton_schulz import (
    COEFFICIENTS,
    SMALLEST_NORM,
    choose_dtype,
    newton_schulz_flops,
    orthogonalize,
)
from smoltrain.kernels.precision import DTYPES
from smoltrain.model.build import build_model
from smoltrain.training.resolve_auto import choose_computing

MEASURED_TOKENS = 1024  # of a micro-batch at most, unless a row has more
MEASURED_WEIGHTS = 2**25  # of a pass over memory: more than any cache holds
STEP, TORCHS = "forward and backward", "torch's own Newton-Schulz"
NEWTON_SCHULZ, MOMENTUM, APPLY, ADAMW = "Newton-Schulz", "momentum", "decay, move and cast", "AdamW's pass"

Shape = tuple[int, int]
TokensOption = Annotated[str, typer.Option(help="Tokens of a step, separated by commas.")]


@dataclass(frozen=True)
class UpdatedWeights:
    """What an optimizer updates."""

    matrices: dict[Shape, int]  # how many hidden matrices of each shape
    num_rest: int  # weights of embeddings, head and vectors

    @property
    def num_hidden(self) -> int:
        """Weights of the hidden matrices."""
        return sum(math.prod(shape) * count for shape, count in self.matrices.items())


@dataclass(frozen=True)
class UpdatePart:
    """One part of an update: its seconds, of a call that may have been of a piece of it."""

    seconds: float
    clean: str  # in words, as CallTimes
    flops: int = 0


def benchmark_optimizer(
    recipe: RecipeArgument, overrides: OverridesArgument = None, tokens: TokensOption = "4096,131072",
    rounds: RoundsOption = 5, out: OutOption = OUT,
) -> None:  # fmt: skip
    """Measure an update by AdamW and by Muon, part by part, and its share of a step of so many tokens.

    Errors: UserError for the recipe and for the tokens.
    """
    config = load_config(recipe, overrides or [])
    tokens_of_steps = read_tokens(tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.engine.device)
    weights = find_updated_weights(build_model(config.model, device="meta"))
    length = config.batch.sequence_length
    rows = max(1, min(MEASURED_TOKENS, *tokens_of_steps) // length)
    steps = config.optimizer.newton_schulz_steps
    step, compute_words = make_step(config, rows, device)
    passes, compiles = make_passes(device)
    calls = {STEP: step} | passes
    calls |= make_newton_schulz(weights, steps, device)
    timed = time_interleaved(calls, rounds=rounds, warm_up=1)
    updates = add_up_parts(timed, weights, steps, device)
    step_s = {count: timed[STEP].median_s * count / (rows * length) for count in tokens_of_steps}
    shares = {
        count: {name: sum_seconds(parts) / (sum_seconds(parts) + took) for name, parts in updates.items()}
        for count, took in step_s.items()
    }
    console = make_console()
    console.print(tabulate_parts(updates))
    console.print(tabulate_shares(shares, step_s, recipe_flops_per_token(config)))
    num_matrices = sum(weights.matrices.values())
    _, why = choose_dtype(device)
    for line in (
        f"{num_matrices} hidden matrices of {weights.num_hidden / 1e6:,.1f}M weights, {weights.num_rest / 1e6:,.1f}M "
        f"others, on {device.type}, {torch.get_num_threads()} threads",
        f"Newton-Schulz: {steps} iterations in {why}; torch's own: bf16, one by one",
        f"a step: {compute_words}; {STEP} of {rows} x {length} tokens took "
        f"{timed[STEP].median_s:.2f} s (clean calls: {timed[STEP].clean}), the tokens of a step are scaled from it",
        f"the passes are {'compiled' if compiles else 'not compiled'}, and scaled from {MEASURED_WEIGHTS:,} weights",
    ):
        console.print(line, soft_wrap=True)
    settings = {
        "recipe": recipe, "overrides": overrides or [], "rounds": rounds, "device": device.type,
        "threads": torch.get_num_threads(), "tokens": tokens_of_steps, "measured_tokens": rows * length,
        "newton_schulz_steps": steps, "compiled_passes": compiles,
    }  # fmt: skip
    measured = {name: {part: asdict(cost) for part, cost in parts.items()} for name, parts in updates.items()}
    write_result(out, settings, (), {"measured": measured, "step_s": step_s, "shares": shares})


def read_tokens(text: str) -> list[int]:
    """The tokens of a step, in the order of the command line. Errors: UserError for what is no number above 0."""
    words = text.split(",")
    for word in words:
        if not word.strip().isdecimal() or int(word) == 0:
            raise UserError(
                Problem("tokens of a step are whole numbers above 0", word, "as in 4096,131072", "--tokens")
            )
    return [int(word) for word in words]


def find_updated_weights(model: nn.Module) -> UpdatedWeights:
    """As the engine splits them."""
    split = split_parameters(model)
    matrices = Counter((matrix.size(0), matrix.size(1)) for matrix in split.hidden.values())
    return UpdatedWeights(dict(matrices), count_elements({**split.tables, **split.others, **split.vectors}))


def make_step(config: Config, rows: int, device: torch.device) -> tuple[Callable[[], object], str]:
    """Forward and backward of a micro-batch of random tokens with the run's kernels, not compiled; and how, in words.

    Errors: UserError for what cannot run on this device.
    """
    chosen = choose_computing(config, device, rows)
    model = build_model(config.model, replace(chosen.computing, compiles=False))
    model.to(device, DTYPES[chosen.precision])
    draws = torch.Generator().manual_seed(config.run.seed)
    ids = torch.randint(config.model.vocab_size, (rows, config.batch.sequence_length), generator=draws).to(device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        (model(ids, ids) / ids.numel()).backward()

    return step, f"{chosen.reasons['precision']}; attention: {chosen.reasons['attention kernel']}"


def make_newton_schulz(weights: UpdatedWeights, steps: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ours and torch's: on a CPU of one matrix of each shape, as all are computed one by one, else of all."""
    calls: dict[str, Callable[[], object]] = {}
    for shape, count in weights.matrices.items():
        stack = torch.randn(1 if device.type == "cpu" else count, *shape, device=device)
        matrices = list(stack.unbind())
        calls[f"{NEWTON_SCHULZ} {shape}"] = lambda matrices=matrices: orthogonalize(matrices, steps)
        calls[f"{TORCHS} {shape}"] = lambda matrices=matrices: [orthogonalize_as_torch(m, steps) for m in matrices]
    return calls


def orthogonalize_as_torch(matrix: Tensor, steps: int) -> Tensor:
    """torch.optim.Muon's."""
    return _zeropower_via_newtonschulz(matrix, COEFFICIENTS, steps, SMALLEST_NORM)


def make_passes(device: torch.device) -> tuple[dict[str, Callable[[], object]], bool]:
    """The passes over memory, of MEASURED_WEIGHTS each, and whether they are compiled."""
    compiles = compile.missing_for_compile(device.type) is None
    blend = blend_momentum.compiled if compiles else blend_momentum
    apply = apply_update.compiled if compiles else apply_update
    adamw = adamw_step.compiled if compiles else adamw_step
    master, first, second, gradient = torch.rand(4, MEASURED_WEIGHTS, device=device).unbind()
    weights = master.bfloat16()
    of_muon = torch.tensor((1.0, 1.0, 0.05), device=device)  # the gradient's scale, applied, 1 - momentum
    of_apply = torch.tensor((1.0, 1.0, 0.999, 1e-3), device=device)  # and 1 - decay, lr
    of_adamw = torch.tensor((1.0, 1.0, 0.999, 0.1, 0.95, 0.05, 1e-3, 1.0, 1e-8), device=device)  # as AdamW packs them
    return {
        MOMENTUM: lambda: blend(first, gradient, of_muon),
        APPLY: lambda: apply(master, weights, gradient, of_apply),
        ADAMW: lambda: adamw(master, first, second, weights, gradient, of_adamw),
    }, compiles


def add_up_parts(
    timed: dict[str, CallTimes], weights: UpdatedWeights, steps: int, device: torch.device
) -> dict[str, dict[str, UpdatePart]]:
    """The parts of each optimizer's update, from what a piece of each took."""

    def scale_pass(name: str, num_weights: int) -> UpdatePart:
        return UpdatePart(timed[name].median_s * num_weights / MEASURED_WEIGHTS, timed[name].num_clean)

    def add_shapes(name: str, dtype: torch.dtype | None) -> UpdatePart:
        pieces = {shape: timed[f"{name} {shape}"] for shape in weights.matrices}
        calls = weights.matrices if device.type == "cpu" else dict.fromkeys(weights.matrices, 1)
        seconds = sum(piece.median_s * calls[shape] for shape, piece in pieces.items())
        flops = sum(newton_schulz_flops(*shape, steps, dtype) * count for shape, count in weights.matrices.items())
        return UpdatePart(seconds, min((piece.num_clean for piece in pieces.values()), default=""), flops)

    computed_in = choose_dtype(device)[0] if device.type == "cpu" else None
    around = {
        MOMENTUM: scale_pass(MOMENTUM, weights.num_hidden), APPLY: scale_pass(APPLY, weights.num_hidden),
        ADAMW: scale_pass(ADAMW, weights.num_rest),
    }  # fmt: skip
    return {
        "adamw": {ADAMW: scale_pass(ADAMW, weights.num_hidden + weights.num_rest)},
        "muon": around | {NEWTON_SCHULZ: add_shapes(NEWTON_SCHULZ, computed_in)},
        "muon, torch's": around | {TORCHS: add_shapes(TORCHS, None)},
    }


def sum_seconds(parts: dict[str, UpdatePart]) -> float:
    """Of a whole update."""
    return sum(part.seconds for part in parts.values())


def tabulate_parts(updates: dict[str, dict[str, UpdatePart]]) -> Table:
    """A line for each part of an update, and one for all of it."""
    table = Table("", "part of an update", "s", "TFLOP", "clean\ncalls")
    for name, parts in updates.items():
        for part, cost in parts.items():
            flops = f"{cost.flops / TERA:.2f}" if cost.flops else ""
            table.add_row(name, part, f"{cost.seconds:.3f}", flops, cost.clean)
        table.add_row(name, "all", f"{sum_seconds(parts):.3f}", end_section=True)
    return table


def tabulate_shares(shares: dict[int, dict[str, float]], step_s: dict[int, float], flops_per_token: float) -> Table:
    """A line for each number of tokens."""
    names = list(next(iter(shares.values())))
    table = Table("tokens\na step", f"{STEP}\ns", "TFLOP", *(f"share of\n{name}" for name in names))
    for count, by_name in shares.items():
        numbers = (f"{by_name[name]:.1%}" for name in names)
        table.add_row(f"{count:,}", f"{step_s[count]:.1f}", f"{count * flops_per_token / TERA:.2f}", *numbers)
    return table


app = make_app(benchmark_optimizer, "smollm2-135m batch.sequence_length=512")

if __name__ == "__main__":
    run_app(app)
