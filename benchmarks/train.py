"""Whole trainers side by side, ours and those that a user would take instead: `python -m benchmarks.train`.

All train the same shape on the same rows, in turn (A B C A B C), and are watched from outside. MFU is the share of the
machine's measured matmul peak that the model's own operations take: tokens/s x (6 N + 12 L D T) / peak, recomputation
not counted (Chowdhery et al. 2022, appendix B).
"""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from benchmarks.command import OUT, OutOption, make_app, make_console, write_result
from benchmarks.launchers import (
    Launcher,
    describe_peer_task,
    divide_rows,
    make_peer_launcher,
    make_smoltrain_launcher,
    trainer_environment,
)
from benchmarks.peak import Peaks, measure_peaks_apart
from benchmarks.peers import Peer, PeerUnavailable, describe_peer_model, parse_peer_names, read_peer_versions
from benchmarks.random_rows import collect_first_rows, random_rows_overrides, write_random_rows
from benchmarks.timing import MIN_CLEAN_CALLS, CallTimes, summarise_times
from benchmarks.watching import TrainerFailed, TrainerRecord, watch_trainer
from smoltrain.cli import OverridesArgument, RecipeArgument, run_app
from smoltrain.config.load import config_to_yaml, load_config
from smoltrain.config.schema import Config
from smoltrain.distributed.world import choose_device
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.estimate.constants import TERA
from smoltrain.estimate.horizon import resolve_config
from smoltrain.estimate.measure import measurement_overrides
from smoltrain.estimate.speed import recipe_flops_per_token
from smoltrain.kernels.precision import choose_precision
from smoltrain.run.run_folder import make_run_record

OURS = "smoltrain"
WARM_UP = 3  # steps that compile, allocate and fill caches
MIN_STEPS = WARM_UP + MIN_CLEAN_CALLS  # steps
PACKAGES = ("deepspeed", "transformers")


@dataclass(frozen=True)
class Task:
    """What every trainer trains: a config of ours, on so many ranks, and what follows from it."""

    config: Config
    ranks: int
    steps: int
    rows_per_step: int
    device: torch.device
    precision: str

    @property
    def on_cuda(self) -> bool:
        """Whether each rank has a GPU of its own; on a CPU the ranks share one machine."""
        return self.device.type == "cuda"

    @property
    def tokens_per_step(self) -> int:
        """Targets of a step, over all ranks."""
        return self.rows_per_step * self.config.batch.sequence_length

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward, as MFU counts them."""
        return recipe_flops_per_token(self.config)


@dataclass(frozen=True)
class TrainerResult:
    """One trainer over all rounds."""

    steps: CallTimes
    tokens_per_s: float
    mfu: float
    peak_gib: float
    start_s: float  # of the last round, when all caches are warm
    loss: tuple[float, float]  # of the first step and of the last one, nats per token
    parameters: int | None


@dataclass
class Comparison:
    """What was seen: each trainer's runs, the machine's peaks before each round, and why a peer has no runs."""

    runs: dict[str, list[TrainerRecord]]
    peaks: list[Peaks]
    not_measured: dict[str, str]


def benchmark_training(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    against: Annotated[
        str,
        typer.Option(
            help="Other trainers: hf-trainer, hf-trainer+compile, hf-trainer+ds, litgpt, plain, plain+compile."
        ),
    ] = "",
    ranks: Annotated[int, typer.Option(min=1, help="Processes of each trainer.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run; the first three are warm-up.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each trainer, in turn.")] = 2,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Micro-batch of the other trainers; by default the recipe's.")
    ] = None,
    out: OutOption = OUT,
) -> None:
    """Measure whole trainers side by side on the same shape and rows: tokens/s, MFU, memory, start-up.

    Errors: UserError for recipe and names; TrainingStopped if our own run fails. A peer that fails has a row that says
    why.
    """
    overrides = overrides or []
    peers = parse_peer_names(against)
    config = load_config(recipe, overrides)
    config = resolve_config(config, config.batch.rows(ranks))
    if peers and micro_batch is None and config.batch.micro_batch == "auto":
        raise UserError(Problem("the peers cannot choose for themselves", "auto", "a number", "--micro-batch"))
    if steps < MIN_STEPS:
        raise UserError(Problem("too few steps to measure", str(steps), f"{MIN_STEPS} or more", "--steps"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        words = [*overrides, *_task_overrides(config, steps, Path(scratch), compared=bool(peers))]
        task = _prepare_task(load_config(recipe, words), config, Path(scratch), ranks, steps)
        micro_batch = micro_batch or task.config.batch.micro_batch_rows
        launchers, unavailable = _make_launchers(task, peers, micro_batch, Path(scratch))
        seen = _run_trainers_in_turn(launchers, task, rounds, out)
    seen.not_measured |= unavailable
    devices = ranks if task.on_cuda else 1
    peak_flops = max(peaks.matmul_flops for peaks in seen.peaks) * devices
    results = {
        name: summarise_trainer_runs(runs, task.tokens_per_step, task.flops_per_token, peak_flops)
        for name, runs in seen.runs.items()
    }
    _print_results(results, seen, task, first_peer=next(iter(peers), None))
    environments = {peers[name].environment for name in results if name in peers}
    settings = {
        "recipe": recipe, "overrides": overrides, "ranks": ranks, "steps": steps, "rounds": rounds,
        "device": task.device.type, "precision": task.precision, "rows_per_step": task.rows_per_step,
        "sequence_length": task.config.batch.sequence_length, "peers_micro_batch": micro_batch,
    }  # fmt: skip
    numbers = {
        "matmul_flops": [peaks.matmul_flops for peaks in seen.peaks], "flops_per_token": task.flops_per_token,
        "data_sheet_flops": seen.peaks[0].data_sheet_flops,
        "measured": {name: asdict(result) for name, result in results.items()}, "not_measured": seen.not_measured,
        "runs": {name: [asdict(run) for run in runs] for name, runs in seen.runs.items()},
        "peers": {name: read_peer_versions(name) for name in sorted(environments)},
    }  # fmt: skip
    write_result(out, settings, PACKAGES, numbers)


def summarise_trainer_runs(
    runs: list[TrainerRecord], tokens_per_step: int, flops: float, peak_flops: float
) -> TrainerResult:
    """A trainer's runs in numbers: medians over the clean steps of all, without each one's warm-up."""
    seconds = [took for run in runs for took in run.step_s[WARM_UP:]]
    waits = [waited for run in runs for waited in run.waits_s[WARM_UP:]]
    steps = summarise_times(seconds, waits)
    tokens_per_s = tokens_per_step / steps.median_s
    return TrainerResult(
        steps=steps, tokens_per_s=tokens_per_s, mfu=tokens_per_s * flops / peak_flops,
        peak_gib=max(run.peak_gib for run in runs), start_s=runs[-1].start_s,
        loss=(median(run.losses[0] for run in runs), median(run.losses[-1] for run in runs)),
        parameters=runs[-1].parameters,
    )  # fmt: skip


def make_comparison_table(results: dict[str, TrainerResult], first_peer: str | None, device: str) -> Table:
    """A line for each trainer; ratios are to the tokens/s of the first peer, if that was measured."""
    memory = "GPU" if device == "cuda" else "RSS"
    heads = ("step\ns", "\ntokens/s", "\nratio", "\nMFU", f"{memory}\nGiB", "start\nup s")
    losses = ("first\nloss", "last\nloss", "clean\nsteps")
    table = Table(
        Column("", no_wrap=True), *heads, *losses,
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    base = results[first_peer].tokens_per_s if first_peer in results else None
    for name, result in results.items():
        table.add_row(
            name, f"{result.steps.median_s:.3f}", f"{result.tokens_per_s:,.0f}",
            f"{result.tokens_per_s / base:.2f}" if base else "", f"{result.mfu:.1%}", f"{result.peak_gib:.2f}",
            f"{result.start_s:.1f}", *(f"{loss:.3f}" for loss in result.loss), result.steps.num_clean,
        )  # fmt: skip
    return table


def _print_results(results: dict[str, TrainerResult], seen: Comparison, task: Task, *, first_peer: str | None) -> None:
    console = make_console()
    console.print(make_comparison_table(results, first_peer, task.device.type))
    for name, why in seen.not_measured.items():
        console.print(f"{name} was not measured: {why}", soft_wrap=True)
    disturbed = [name for name, result in results.items() if result.steps.counts_all]
    if disturbed:
        console.print(f"too few clean steps, so that all count: {', '.join(disturbed)}", soft_wrap=True)
    measured_flops = max(peaks.matmul_flops for peaks in seen.peaks)
    console.print(
        f"matmul peak in {task.precision}: {measured_flops / 1e9:,.0f} GFLOP/s; "
        f"{task.flops_per_token / 1e9:.3g} GFLOP per token"
    )
    if task.on_cuda:
        console.print(describe_data_sheet_mfu(results, seen.peaks[0], measured_flops), soft_wrap=True)


def describe_data_sheet_mfu(results: dict[str, TrainerResult], peaks: Peaks, measured_flops: float) -> str:
    """Each trainer's MFU once more, of the peak of a GPU's data sheet; or why there is none."""
    if peaks.data_sheet_flops is None:
        return f"MFU is of the measured peak alone: {peaks.data_sheet}"
    ratio = measured_flops / peaks.data_sheet_flops
    shares = ", ".join(f"{name} {result.mfu * ratio:.1%}" for name, result in results.items())
    return f"MFU of the {peaks.data_sheet_flops / TERA:,.0f} TFLOP/s of {peaks.data_sheet}: {shares}"


def _task_overrides(config: Config, steps: int, scratch: Path, *, compared: bool) -> list[str]:
    """Overrides by which a recipe trains the same on our side as the peers do: random rows, a constant rate."""
    first = f"phases.{config.phases[0].name}"
    words = [
        *random_rows_overrides(scratch / "data"), *measurement_overrides(config, steps, scratch / "dealt"),
        f"{first}.schedule=constant", f"{first}.decay_steps=0", f"{first}.final_lr=0", "init.from=null",
        *(f"phases.{phase.name}.mix=null" for phase in config.phases),
    ]  # fmt: skip
    if compared:
        words.append("packing.document_mask=false")  # peers have none
    return words


def _prepare_task(config: Config, asked: Config, scratch: Path, ranks: int, steps: int) -> Task:
    """Write what is trained: scratch/bench.yaml for us, the rows for peers in scratch/rows.npy.

    `config` is that of the few steps, `asked` that of the recipe's whole plan.
    """
    # What a run chooses may depend on how long its plan is, so the plan goes on behind the steps that are measured.
    phase = config.phases[0]
    rest = {"name": f"{phase.name}-rest", "steps": sum(phase.num_steps for phase in asked.phases)}
    config = config.model_copy(update={"phases": (phase, phase.model_copy(update=rest))})
    device = choose_device(config.engine.device)
    precision, _ = choose_precision(config.engine.precision, device)
    rows_per_step = make_run_record(config, ranks, 0).provenance["rows_per_step"]
    T = config.batch.sequence_length
    write_random_rows(scratch / "data", config.model.vocab_size, (steps + 2) * rows_per_step * (T + 1), T)
    (scratch / "bench.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    np.save(scratch / "rows.npy", collect_first_rows(config, steps, rows_per_step))
    return Task(config, ranks, steps, rows_per_step, device, precision)


def _make_launchers(
    task: Task, peers: dict[str, Peer], micro_batch: int, scratch: Path
) -> tuple[dict[str, Launcher], dict[str, str]]:
    """How each trainer is started; and for a peer that cannot be, why. Errors: UserError for the micro-batch."""
    launchers: dict[str, Launcher] = {OURS: make_smoltrain_launcher(scratch / "bench.yaml", task.ranks)}
    unavailable: dict[str, str] = {}
    accumulation = divide_rows(task.rows_per_step, micro_batch, task.ranks)
    peer_task = describe_peer_task(task.config, task.steps, micro_batch, accumulation, scratch / "rows.npy")
    for name, peer in peers.items():
        try:
            model = describe_peer_model(peer, task.config.model)
            launchers[name] = make_peer_launcher(peer, peer_task | model, task.ranks)
        except PeerUnavailable as why:
            unavailable[name] = str(why)
    return launchers, unavailable


def _run_trainers_in_turn(launchers: dict[str, Launcher], task: Task, rounds: int, out: Path) -> Comparison:
    """Run each trainer once a round; a peer that fails gets a reason and no more turns.

    What a trainer that failed has said is kept beside `out`. Errors: TrainingStopped if it is our own.
    """
    seen = Comparison({name: [] for name in launchers}, [], {})
    for number in range(1, rounds + 1):
        seen.peaks.append(measure_peaks_apart(task.precision))
        for name, launch in launchers.items():
            if name in seen.not_measured:
                continue
            with tempfile.TemporaryDirectory() as folder:
                command, lines, variables = launch(Path(folder))
                env = trainer_environment(Path(command[0]).parent, task.ranks, cuda=task.on_cuda) | variables
                try:
                    run = watch_trainer(command, lines, task.steps, env, Path(folder, "log"), cuda=task.on_cuda)
                except TrainerFailed as why:
                    kept = shutil.copy(Path(folder, "log"), out.with_suffix(f".{name}.log"))
                    if name == OURS:
                        raise TrainingStopped(f"the run that was to be measured: {why} ({kept})") from None
                    seen.not_measured[name] = f"{why} ({kept})"
                    continue
            seen.runs[name].append(run)
            took = summarise_times(run.step_s[WARM_UP:], run.waits_s[WARM_UP:])
            print(f"round {number}: {name}, {took.median_s:.3f} s a step, clean {took.clean}", flush=True)
    seen.runs = {name: runs for name, runs in seen.runs.items() if runs}
    return seen


app = make_app(benchmark_training, "quickstart --against hf-trainer,plain --rounds 2")

if __name__ == "__main__":
    run_app(app)
