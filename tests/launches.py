"""Real command lines, and what they left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from smoltrain import files
from smoltrain.distributed.world import free_port
from tests import preloaded

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "launch" / "train.py")
RANK_MODULE = "smoltrain.launch.rank"  # what `smoltrain train` starts
TIMEOUT_S = 180


def command(launcher: str, programs: Path = BIN) -> list[str]:
    """The words before RECIPE for two ranks (one under plain python)."""
    port = str(free_port())
    return {
        "python": [str(programs / "python"), SCRIPT],
        "torchrun": [str(programs / "torchrun"), "--nproc-per-node", "2", "--master-port", port, SCRIPT],
        "deepspeed": [str(programs / "deepspeed"), "--num_accelerators", "2", "--master_port", port, SCRIPT],
        "smoltrain": [str(programs / "smoltrain"), "train"],
    }[launcher]


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Look again and again, until it is true."""
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.02)


def environment() -> dict[str, str]:
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return (
        {k: v for k, v in os.environ.items() if k not in own}
        | {"OMP_NUM_THREADS": "1"}
        | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})
    )


def start(launcher: str, words: list[str], log: Path, programs: Path = BIN) -> subprocess.Popen[Any]:
    """Start a run in the background, its output in `log`."""
    line = [*command(launcher, programs), "quickstart", *words]
    with log.open("ab") as out:
        return subprocess.Popen(
            line, stdout=out, stderr=subprocess.STDOUT, env=environment(),
            cwd=log.parent, start_new_session=True,
        )  # fmt: skip


def run(
    launcher: str, words: list[str], log: Path, timeout_s: float = TIMEOUT_S, *, preloads: bool = True
) -> int:  # fmt: skip
    """Run to the end; returns the exit code. Nobody sends the programs a signal, so that they may be preloaded.

    They are forked then: `preloads` is False where Python is to read what a start of its own reads (sitecustomize.py).
    """
    process = start(launcher, words, log, preloaded.programs() if preloads else BIN)
    try:
        return process.wait(timeout_s)
    finally:
        kill_all(words)


def ranks_alive(words: list[str]) -> list[psutil.Process]:
    """The rank processes of the run that these words name."""
    return [process for process, line in _processes(words) if SCRIPT in line[:3] or RANK_MODULE in line[:5]]


def alive(words: list[str]) -> dict[int, psutil.Process]:
    """Every living process whose command line names this run: ranks, launchers and what stands above them."""
    return {process.pid: process for process, _ in _processes(words)}


def _processes(words: list[str]) -> Iterator[tuple[psutil.Process, list[str]]]:
    """The living processes of the run that these words name, each with its command line."""
    folder = next(word for word in words if word.startswith("run.folder="))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if folder in line and process.status() != psutil.STATUS_ZOMBIE:
                yield process, line


def launcher_of(rank: psutil.Process) -> psutil.Process:
    """The process that started a rank: torchrun, or DeepSpeed's launcher, above which its runner stands."""
    parent = rank.parent()
    assert parent is not None
    return parent


def kill_all(words: list[str]) -> None:
    for process in alive(words).values():
        with contextlib.suppress(psutil.Error):
            process.kill()


def wait_for_step(run_folder: Path, step: int, process: subprocess.Popen[Any]) -> None:
    """Return as soon as metrics.jsonl tells of this step."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the run ended (exit code {process.returncode}) before step {step}"
        if any(line["step"] >= step for line in metrics(run_folder)):
            return
        time.sleep(0.02)
    raise TimeoutError(f"no step {step}")


def wait_until_gone(words: list[str], seconds: float = 40) -> None:
    """No process of this run may be alive after so long."""
    deadline = time.monotonic() + seconds
    while there := alive(words):
        assert time.monotonic() < deadline, f"still alive: {there}"
        time.sleep(0.1)


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    return list(files.read_jsonl(run_folder / "metrics.jsonl"))


def losses(run_folder: Path) -> dict[int, float]:
    """Step -> training loss."""
    key = "train/loss_nats_per_token"
    return {line["step"]: line[key] for line in metrics(run_folder) if key in line}


def weights_digest(run_folder: Path, step: int) -> dict[str, str]:
    """SHA-256 of the checkpoint's files that hold weights and moments."""
    manifest = json.loads((run_folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: f["sha256"] for name, f in manifest["files"].items() if name == "model.safetensors"}


def interrupt(process: subprocess.Popen[Any], number: int = signal.SIGTERM) -> None:
    process.send_signal(number)
