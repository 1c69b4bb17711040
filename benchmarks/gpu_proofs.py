"""What must hold on a GPU before its speed matters: `python -m benchmarks.gpu_proofs tests|quickstart|resume|zero`.

tests        tests/gpu
quickstart   trains as it is shipped; its checkpoint and its export compute what was trained
resume       killed by SIGKILL in the middle and started again, a run ends in the same bits as one that was not
zero         the same for a run that ends and goes on, under ZeRO-1, 2 and 3, both ways of reducing gradients

Bits can be compared only where kernels give the same ones each time: the runs that are compared take math's attention,
and are not compiled. Exit codes: benchmarks/parts.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import smoltrain
from benchmarks.gpu_task import TINY_SHAPE
from benchmarks.parts import CODE_FAIL, CODE_NOT_RUN, CODE_PASS, end_process_family
from benchmarks.peak import ROOT
from smoltrain import files
from smoltrain.checkpoint.manifest import step_folder
from smoltrain.config.load import load_config

RECIPE = "quickstart"
LOSS = "train/loss_nats_per_token"
SAME_BITS = ("engine.attention=math", "engine.compile=off")
ZERO_WAYS = {  # name -> overrides; all in fp32, in which ZeRO-1 can reduce either way too
    "zero1-step": ("engine.ds_config=zero1", "engine.reduce_gradients=step"),
    "zero1-micro-batch": ("engine.ds_config=zero1", "engine.reduce_gradients=micro_batch"),
    "zero2-step": ("engine.ds_config=zero2", "engine.reduce_gradients=step"),
    "zero2-micro-batch": ("engine.ds_config=zero2", "engine.reduce_gradients=micro_batch"),
    "zero3": ("engine.ds_config=zero3",),
}
TINY_ZERO_WAYS = ("zero2-micro-batch", "zero3")
START_LIMIT_S = 120.0


class ProofFailed(Exception):
    """What does not hold, in a line."""


def list_common_overrides(scratch: Path, *, tiny: bool) -> list[str]:
    """Of all runs here: no W&B, their folder, and for a tiny one a shape and a text that take no time."""
    words = [f"run.folder={scratch}", "track.wandb=off", "sample.every=0"]
    if not tiny:
        return words
    text = scratch / "text"
    text.mkdir(exist_ok=True)
    for number in range(8):
        lines = [f"{number} and {other} are {number + other}, said the king." for other in range(200)]
        (text / f"{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sizes = ["model.vocab_size=320", "tokenizer.vocab_size=320", "batch.sequence_length=16"]
    return [*words, *TINY_SHAPE, *sizes, f"data.path={text}", "data.package=null", "data.pattern=*.txt"]


def prove_tests(_scratch: Path, *, tiny: bool) -> None:
    """Errors: ProofFailed where a test fails."""
    del tiny
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--durations=5"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise ProofFailed(f"pytest ended with code {done.returncode}")


def prove_quickstart(scratch: Path, *, tiny: bool) -> None:
    """Errors: ProofFailed where a command fails, or where nothing was learned."""
    steps = 4 if tiny else 80
    words = [*list_common_overrides(scratch, tiny=tiny), "run.name=shipped"]
    words += [f"phases.main.steps={steps}", "phases.main.warmup_steps=2", "run.stop_after=main"]
    run_command(["train", RECIPE, *words])
    losses = read_losses(scratch / "shipped")
    first, last = losses[1], losses[steps]
    print(f"loss {first:.3f} after 1 step, {last:.3f} after {steps}", flush=True)
    if not last < first:
        raise ProofFailed(f"nothing was learned: loss {first:.3f}, then {last:.3f}")
    run_command(["verify", str(scratch / "shipped"), "--forward"])
    run_command(["export", str(scratch / "shipped")])


def prove_resume(scratch: Path, *, tiny: bool) -> None:
    """Errors: ProofFailed where the bits differ, or where the run could not be killed in time."""
    every, kill_after, steps = (5, 8, 40) if tiny else (50, 75, 400)
    words = [*list_common_overrides(scratch, tiny=tiny), *SAME_BITS, "track.gradients_every=0", "evaluate.every=0"]
    words += [f"phases.main.steps={steps}", "phases.main.warmup_steps=2", "run.stop_after=main"]
    words += [f"checkpoint.every={every}"]
    run_command(["train", RECIPE, *words, "run.name=whole"])
    kill_run([*words, "run.name=killed"], scratch / "killed", kill_after)
    run_command(["train", RECIPE, *words, "run.name=killed"])
    starts = list(read_metric(scratch / "killed", "speed/start_s"))  # which the first line of each start tells
    print(f"the killed run began at step {' and at step '.join(map(str, starts))}", flush=True)
    if len(starts) != 2 or starts[1] <= every or (starts[1] - 1) % every:
        raise ProofFailed("the second start did not go on from a checkpoint")
    compare_runs(scratch / "whole", scratch / "killed", steps)


def kill_run(words: Sequence[str], folder: Path, step: int) -> None:
    """Start a run and kill all of it when it has done this step. Errors: ProofFailed if it ends before."""
    process = subprocess.Popen([*smoltrain_command(), "train", RECIPE, *words, "--ranks=1"], text=True, cwd=ROOT)
    give_up_at = time.monotonic() + START_LIMIT_S
    metrics = folder / files.METRICS_FILE
    try:
        while f'{{"step": {step},' not in (metrics.read_text(encoding="utf-8") if metrics.exists() else ""):
            if process.poll() is not None:
                raise ProofFailed(f"the run ended with code {process.returncode} before it could be killed")
            if time.monotonic() > give_up_at:
                raise ProofFailed(f"the run did not reach step {step} in {START_LIMIT_S:.0f} s")
            time.sleep(0.002)
        if process.poll() is not None:
            raise ProofFailed("the run ended before it could be killed")
    finally:
        end_process_family(process)
    print(f"killed at step {max(read_losses(folder))}", flush=True)


def prove_zero(scratch: Path, *, tiny: bool) -> None:
    """Errors: ProofFailed where a state that was saved and restored is not what it would have become without."""
    words = [*list_common_overrides(scratch, tiny=tiny), *SAME_BITS, "track.gradients_every=0", "evaluate.every=0"]
    words += ["phases.main.steps=3", "phases.continuation.steps=2", "phases.main.warmup_steps=1"]
    for name in TINY_ZERO_WAYS if tiny else ZERO_WAYS:
        own = [*words, *ZERO_WAYS[name], "engine.precision=fp32"]
        smoltrain.train(load_config(RECIPE, [*own, f"run.name={name}-whole"]))
        smoltrain.train(load_config(RECIPE, [*own, f"run.name={name}-halves", "run.stop_after=main"]))
        smoltrain.train(load_config(RECIPE, [*own, f"run.name={name}-halves"]))
        print(f"{name}:", flush=True)
        compare_runs(scratch / f"{name}-whole", scratch / f"{name}-halves", 5)


def compare_runs(one: Path, other: Path, step: int) -> None:
    """Losses and norms of all steps, weights and optimizer state of the last. Errors: ProofFailed if a bit differs."""
    for key in (LOSS, "train/grad_norm_before_clipping"):
        ours, theirs = read_metric(one, key), read_metric(other, key)
        differing = [at for at in range(1, step + 1) if ours.get(at) != theirs.get(at) or at not in ours]
        if differing:
            raise ProofFailed(f"{key} differs in {len(differing)} of {step} steps, first in step {differing[0]}")
    ours, theirs = (read_hashes_of_state(step_folder(run / "checkpoints", step)) for run in (one, other))
    if ours != theirs or not ours:
        wrong = [name for name in ours if ours[name] != theirs.get(name)]
        raise ProofFailed(f"the checkpoints of step {step} differ in {', '.join(wrong) or 'their files'}")
    print(f"{step} steps and {', '.join(ours)}: the same bits", flush=True)


def read_hashes_of_state(checkpoint: Path) -> dict[str, str]:
    """Of the weights and the optimizer's shards, by name, out of the manifest."""
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    ends = ("model.safetensors", "_optim_states.pt")
    return {name: record["sha256"] for name, record in manifest["files"].items() if name.endswith(ends)}


def read_losses(run: Path) -> dict[int, float]:
    """By step."""
    return read_metric(run, LOSS)


def read_metric(run: Path, key: str) -> dict[int, float]:
    """Of metrics.jsonl, by step."""
    return {line["step"]: line[key] for line in files.read_jsonl(run / files.METRICS_FILE) if key in line}


def smoltrain_command() -> list[str]:
    """`smoltrain`, of this environment."""
    return [sys.executable, "-m", "smoltrain"]


def run_command(words: Sequence[str]) -> None:
    """Run `smoltrain WORDS`, which prints as it goes. Errors: ProofFailed unless it ends with 0."""
    ranks = ["--ranks=1"] if words[0] == "train" else []
    done = subprocess.run([*smoltrain_command(), *words, *ranks], cwd=ROOT, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ProofFailed(f"smoltrain {words[0]} ended with code {done.returncode}")


PROOFS: dict[str, Callable[..., None]] = {
    "tests": prove_tests,
    "quickstart": prove_quickstart,
    "resume": prove_resume,
    "zero": prove_zero,
}


def prove() -> int:
    """The command; its exit code. The last line says what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("proof", choices=PROOFS)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.proof == "tests" and not torch.cuda.is_available():
        print("no CUDA device: tests/gpu would be skipped")
        return CODE_NOT_RUN
    os.environ.setdefault("WANDB_MODE", "disabled")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            PROOFS[arguments.proof](Path(scratch), tiny=arguments.tiny)
        except ProofFailed as failure:
            print(failure, flush=True)
            return CODE_FAIL
    print(f"{arguments.proof}: all of it holds", flush=True)
    return CODE_PASS


if __name__ == "__main__":
    sys.exit(prove())
