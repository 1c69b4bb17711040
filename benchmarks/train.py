"""Whole trainers side by side: `smoltrain bench train`, ours and those that a user would take instead.

All train the same shape on the same rows, in turn (A B C A B C), and are watched from outside. MFU is the share of the
machine's measured matmul peak that the model's own operations take: tokens/s x (6 N + 12 L D T) / peak, recomputation
not counted (Chowdhery et al. 2022, appendix B).
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from benchmarks.about import describe_benchmark
from benchmarks.peers import (
    Peer,
    PeerUnavailable,
    build_peer_command,
    describe_peer_model,
    model_depth_and_width,
    parse_peer_names,
    peer_variables,
    read_peer_versions,
)
from benchmarks.random_rows import collect_first_rows, random_rows_overrides, write_random_rows
from benchmarks.timing import MIN_CLEAN_CALLS, CallTimes, summarise_times
from benchmarks.watching import TrainerFailed, TrainerRecord, watch_trainer
from smoltrain import files
from smoltrain.config.load import config_to_yaml, load_config, measurement_overrides
from smoltrain.config.schema import Config
from smoltrain.distributed.cpu_cores import cores_per_process
from smoltrain.distributed.world import choose_device, environment_without_launcher, free_port
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.estimate.speed import flops_per_token
from smoltrain.kernels.precision import choose_precision
from smoltrain.model.build import build_model, count_parameters
from smoltrain.run.run_folder import check_run_folder

OURS = "smoltrain"
WARM_UP = 3  # steps that compile, allocate and fill caches
MIN_STEPS = WARM_UP + MIN_CLEAN_CALLS  # steps
PACKAGES = ("deepspeed", "transformers")
# A fresh folder -> the command, the file of its lines, environment variables of its own.
Launcher = Callable[[Path], tuple[list[str], Path, dict[str, str]]]


@dataclasses.dataclass(frozen=True)
class TrainerResult:
    """One trainer over all rounds."""

    steps: CallTimes
    tokens_per_s: float
    mfu: float
    peak_gib: float
    start_s: float  # of the last round, when all caches are warm
    loss: tuple[float, float]  # of the first step and of the last one, nats per token
    parameters: int | None


def benchmark_training(
    recipe: str, overrides: list[str], against: str, ranks: int, steps: int, rounds: int, micro_batch: int | None,
    out: Path,
) -> None:  # fmt: skip
    """Measure, print a table, and write `out` (JSON). `micro_batch` is the peers', by default the recipe's.

    Errors: UserError for recipe and names; TrainingStopped if our own run fails. A peer that fails has a row that says
    why.
    """
    wanted = parse_peer_names(against)
    if wanted and micro_batch is None and load_config(recipe, overrides).batch.micro_batch == "auto":
        raise UserError(Problem("the peers cannot choose for themselves", "auto", "a number", "--micro-batch"))
    if steps < MIN_STEPS:
        raise UserError(Problem("too few steps to measure", str(steps), f"{MIN_STEPS} or more", "--steps"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        settings, rows_per_step = _prepare_task(recipe, overrides, Path(scratch), ranks, steps, bool(wanted))
        device, section = choose_device(settings.engine.device), settings.model
        precision, _ = choose_precision(settings.engine.precision, device)
        starts: dict[str, Launcher] = {OURS: _make_smoltrain_launcher(Path(scratch), ranks)}
        reasons: dict[str, str] = {}
        micro_batch = micro_batch or settings.batch.micro_batch_rows
        split = _split_peer_batch(micro_batch, rows_per_step, ranks)
        base = split | _describe_peer_task(settings, Path(scratch, "rows.npy"), steps, precision, device.type)
        for name, peer in wanted.items():
            try:
                task = base | describe_peer_model(peer, section)
                starts[name] = _make_peer_launcher(peer, task, ranks)
            except PeerUnavailable as why:
                reasons[name] = str(why)
        seen, peaks = _run_trainers_in_turn(
            starts, reasons, precision, rounds, steps, ranks, out, cuda=device.type == "cuda"
        )
    T = settings.batch.sequence_length
    flops = flops_per_token(count_parameters(build_model(section, device="meta")), *model_depth_and_width(section), T)
    machines = ranks if device.type == "cuda" else 1  # ranks on a CPU share it
    rows = {
        name: summarise_trainer_runs(runs, rows_per_step * T, flops, max(peaks) * machines)
        for name, runs in seen.items()
    }
    console = Console(markup=False, highlight=False)
    console.print(make_comparison_table(rows, next(iter(wanted), None), device.type))
    for name, why in reasons.items():
        console.print(f"{name} was not measured: {why}", soft_wrap=True)
    if disturbed := [name for name, found in rows.items() if "all" in found.steps.clean]:
        console.print(f"too few clean steps, so that all count: {', '.join(disturbed)}", soft_wrap=True)
    console.print(f"matmul peak in {precision}: {max(peaks) / 1e9:,.0f} GFLOP/s; {flops / 1e9:.3g} GFLOP per token")
    used = {wanted[name].environment for name in rows if name in wanted}
    depends = {
        "recipe": recipe, "overrides": overrides, "ranks": ranks, "steps": steps, "rounds": rounds,
        "device": device.type, "precision": precision, "rows_per_step": rows_per_step, "sequence_length": T,
        "peers_micro_batch": micro_batch,
    }  # fmt: skip
    numbers = {
        "matmul_flops": peaks, "flops_per_token": flops,
        "measured": {name: dataclasses.asdict(found) for name, found in rows.items()}, "not_measured": reasons,
        "runs": {name: [dataclasses.asdict(run) for run in runs] for name, runs in seen.items()},
        "peers": {name: read_peer_versions(name) for name in sorted(used)},
    }  # fmt: skip
    files.write_json_file(out, describe_benchmark(depends, PACKAGES) | numbers)
    console.print(out)


def summarise_trainer_runs(
    runs: list[TrainerRecord], tokens_per_step: int, flops: float, peak_flops: float
) -> TrainerResult:
    """A trainer's runs in numbers: medians over the clean steps of all, without each one's warm-up."""
    seconds = [took for run in runs for took in run.step_s[WARM_UP:]]
    steps = summarise_times(seconds, [waited for run in runs for waited in run.waits_s[WARM_UP:]])
    rate = tokens_per_step / steps.median_s
    first, last = (median(run.losses[i] for run in runs) for i in (0, -1))
    peak_gib = max(run.peak_gib for run in runs)
    return TrainerResult(
        steps, rate, rate * flops / peak_flops, peak_gib, runs[-1].start_s, (first, last), runs[-1].parameters
    )


def make_comparison_table(rows: dict[str, TrainerResult], first: str | None, device: str) -> Table:
    """A line for each trainer; ratios are to the tokens/s of the first peer, if that was measured."""
    memory = "GPU" if device == "cuda" else "RSS"
    heads = ("\nratio", "\nMFU", f"{memory}\nGiB", "start\nup s", "first\nloss", "last\nloss", "clean\nsteps")
    table = Table(
        Column("", no_wrap=True),
        "step\ns",
        "\ntokens/s",
        *heads,
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    base = rows[first].tokens_per_s if first in rows else None
    for name, found in rows.items():
        ratio = f"{found.tokens_per_s / base:.2f}" if base else ""
        numbers = (f"{found.steps.median_s:.3f}", f"{found.tokens_per_s:,.0f}", ratio, f"{found.mfu:.1%}")
        others = (f"{found.peak_gib:.2f}", f"{found.start_s:.1f}", *(f"{loss:.3f}" for loss in found.loss))
        table.add_row(name, *numbers, *others, found.steps.clean.partition(",")[0].replace(" of ", "/"))
    return table


def _prepare_task(
    recipe: str, overrides: list[str], scratch: Path, ranks: int, steps: int, compared: bool
) -> tuple[Config, int]:
    """What is trained, as scratch/bench.yaml too, and its rows per step; the rows for peers in scratch/rows.npy."""
    asked = load_config(recipe, overrides)
    phases, first = asked.phases, f"phases.{asked.phases[0].name}"
    words = [
        *overrides, *random_rows_overrides(scratch / "data"), *measurement_overrides(asked, steps),
        f"{first}.schedule=constant", f"{first}.decay_steps=0", f"{first}.final_lr=0", "init.from=null",
        *(f"phases.{phase.name}.mix=null" for phase in phases), "run.name=bench", f"run.folder={scratch / 'dealt'}",
    ]  # fmt: skip
    if compared:
        words.append("packing.document_mask=false")  # peers have none
    settings = load_config(recipe, words)
    # What a run chooses may depend on how long its plan is, so the plan goes on behind the steps that are measured.
    rest = {"name": f"{phases[0].name}-rest", "steps": sum(phase.steps for phase in phases)}
    settings = settings.model_copy(update={"phases": (settings.phases[0], settings.phases[0].model_copy(update=rest))})
    rows_per_step, T = check_run_folder(settings, ranks, 0)["rows_per_step"], settings.batch.sequence_length
    write_random_rows(scratch / "data", settings.model.vocab_size, (steps + 2) * rows_per_step * (T + 1), T)
    (scratch / "bench.yaml").write_text(config_to_yaml(settings), encoding="utf-8")
    np.save(scratch / "rows.npy", collect_first_rows(settings, steps, rows_per_step))
    return settings, rows_per_step


def _split_peer_batch(micro_batch: int, rows_per_step: int, ranks: int) -> dict[str, int]:
    """The peers' micro-batches. Errors: UserError where they do not divide a step."""
    accumulation, rest = divmod(rows_per_step, micro_batch * ranks)
    if rest:
        what = f"the peers' micro-batch does not divide {rows_per_step} rows on {ranks} ranks"
        raise UserError(Problem(what, str(micro_batch), f"a divisor of {rows_per_step // ranks}", "--micro-batch"))
    return {"micro_batch": micro_batch, "accumulation": accumulation}


def _describe_peer_task(settings: Config, rows: Path, steps: int, precision: str, device: str) -> dict[str, Any]:
    """What all peers are given (peers/peer.py)."""
    phase, optimizer = settings.phases[0], settings.optimizer
    return {
        "rows": str(rows), "steps": steps, "precision": precision, "device": device, "seed": settings.run.seed,
        "recompute": settings.engine.gradient_checkpointing == "full", "lr": phase.lr,
        "weight_decay": phase.weight_decay, "beta1": optimizer.beta1, "beta2": optimizer.beta2, "eps": optimizer.eps,
        "gradient_clipping": optimizer.gradient_clipping,
    }  # fmt: skip


def _make_smoltrain_launcher(scratch: Path, ranks: int) -> Launcher:
    def start(folder: Path) -> tuple[list[str], Path, dict[str, str]]:
        smoltrain = str(Path(sys.executable).with_name("smoltrain"))
        words = [smoltrain, "train", str(scratch / "bench.yaml"), f"run.folder={folder}", f"--ranks={ranks}"]
        return words, folder / "bench" / "metrics.jsonl", {}

    return start


def _make_peer_launcher(peer: Peer, task: dict[str, Any], ranks: int) -> Launcher:
    """Errors: peers.Unavailable, now rather than in the middle of the rounds."""
    build_peer_command(peer, Path("task.json"), ranks, 0)

    def start(folder: Path) -> tuple[list[str], Path, dict[str, str]]:
        lines, file = folder / "lines.jsonl", folder / "task.json"
        file.write_text(json.dumps(task | {"lines": str(lines), "folder": str(folder / "out")}), encoding="utf-8")
        return build_peer_command(peer, file, ranks, free_port()), lines, peer_variables(peer)

    return start


def _run_trainers_in_turn(
    starts: dict[str, Launcher], reasons: dict[str, str], precision: str, rounds: int, steps: int, ranks: int,
    out: Path, *, cuda: bool,
) -> tuple[dict[str, list[TrainerRecord]], list[float]]:  # fmt: skip
    """Each trainer's runs, and the matmul peak before each round; a peer that fails gets a reason and no more turns.

    What a trainer that failed has said is kept beside `out`.
    """
    seen: dict[str, list[TrainerRecord]] = {name: [] for name in starts}
    peaks = []
    for number in range(1, rounds + 1):
        peaks.append(_measure_in_own_process(precision))
        for name, start in starts.items():
            if name in reasons:
                continue
            with tempfile.TemporaryDirectory() as folder:
                command, lines, variables = start(Path(folder))
                env = trainer_environment(Path(command[0]).parent, ranks, cuda=cuda) | variables
                try:
                    run = watch_trainer(command, lines, steps, env, Path(folder, "log"), cuda=cuda)
                except TrainerFailed as why:
                    kept = shutil.copy(Path(folder, "log"), out.with_suffix(f".{name}.log"))
                    if name == OURS:
                        raise TrainingStopped(f"the run that was to be measured: {why} ({kept})") from None
                    reasons[name] = f"{why} ({kept})"
                    continue
            seen[name].append(run)
            took = summarise_times(run.step_s[WARM_UP:], run.waits_s[WARM_UP:])
            print(f"round {number}: {name}, {took.median_s:.3f} s a step, clean {took.clean}", flush=True)
    return {name: runs for name, runs in seen.items() if runs}, peaks


def trainer_environment(binaries: Path, ranks: int, *, cuda: bool) -> dict[str, str]:
    """What every trainer is started under: its own folder of programs first, the cores shared out among the ranks."""
    own = environment_without_launcher()
    device = {} if cuda else {"DS_ACCELERATOR": "cpu"}
    path = f"{binaries}{os.pathsep}{own.get('PATH', '')}"
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return own | quiet | device | {"OMP_NUM_THREADS": str(cores_per_process(ranks)), "PATH": path}


def _measure_in_own_process(precision: str) -> float:
    words = [sys.executable, "-m", "benchmarks.peak", precision]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
