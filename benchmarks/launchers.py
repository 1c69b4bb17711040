"""How each trainer is started: ours by its command, a peer by its script and a file that describes the task."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import Peer, build_peer_command, peer_variables
from smoltrain.config.schema import Config
from smoltrain.distributed.cpu_cores import cores_per_process
from smoltrain.distributed.world import choose_device, environment_without_launcher, free_port
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.measure import RUN_NAME
from smoltrain.kernels.precision import choose_precision
from smoltrain.schedule import Plan

# A fresh folder -> the command, the file of its lines, environment variables of its own.
Launcher = Callable[[Path], tuple[list[str], Path, dict[str, str]]]


def make_smoltrain_launcher(recipe: Path, ranks: int) -> Launcher:
    """Of a recipe whose run.name is RUN_NAME."""

    def start(folder: Path) -> tuple[list[str], Path, dict[str, str]]:
        smoltrain = str(Path(sys.executable).with_name("smoltrain"))
        words = [smoltrain, "train", str(recipe), f"run.folder={folder}", f"--ranks={ranks}"]
        return words, folder / RUN_NAME / "metrics.jsonl", {}

    return start


def make_peer_launcher(peer: Peer, peer_task: dict[str, Any], ranks: int) -> Launcher:
    """Errors: PeerUnavailable, now rather than in the middle of the rounds."""
    build_peer_command(peer, Path("task.json"), ranks, 0)

    def start(folder: Path) -> tuple[list[str], Path, dict[str, str]]:
        lines, file = folder / "lines.jsonl", folder / "task.json"
        own = {"lines": str(lines), "folder": str(folder / "out")}
        file.write_text(json.dumps(peer_task | own), encoding="utf-8")
        return build_peer_command(peer, file, ranks, free_port()), lines, peer_variables(peer)

    return start


def divide_rows(rows_per_step: int, micro_batch: int, ranks: int) -> int:
    """The peers' gradient accumulation. Errors: UserError where micro-batches do not divide a step."""
    accumulation, rest = divmod(rows_per_step, micro_batch * ranks)
    if rest:
        what = f"the peers' micro-batch does not divide {rows_per_step} rows on {ranks} ranks"
        raise UserError(Problem(what, str(micro_batch), f"a divisor of {rows_per_step // ranks}", "--micro-batch"))
    return accumulation


def describe_peer_task(
    config: Config, steps: int, micro_batch: int, accumulation: int, rows: Path, validation: Path | None = None,
    validate_every: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """What all peers are given (peers/peer.py): the first phase of a config of ours, whose steps are known."""
    phase = config.phases[0]
    optimizer = config.optimizer
    device = choose_device(config.engine.device)
    precision, _ = choose_precision(config.engine.precision, device)
    plan = Plan(config.phases)
    return {
        "micro_batch": micro_batch, "accumulation": accumulation, "rows": str(rows), "steps": steps,
        "validation": str(validation) if validation else None, "validate_every": validate_every,
        "precision": precision, "device": device.type, "seed": config.run.seed,
        "recompute": config.engine.gradient_checkpointing == "full",
        "lr": phase.lr, "lrs": [plan.lr(step) for step in range(1, steps + 1)], "schedule": phase.schedule,
        "warmup_steps": phase.warmup_steps, "final_lr": phase.final_lr, "weight_decay": phase.weight_decay,
        "beta1": optimizer.beta1, "beta2": optimizer.beta2, "eps": optimizer.eps,
        "gradient_clipping": optimizer.gradient_clipping,
    }  # fmt: skip


def trainer_environment(binaries: Path, ranks: int, *, cuda: bool) -> dict[str, str]:
    """What every trainer is started under: its own folder of programs first, the cores shared out among the ranks."""
    own = environment_without_launcher()
    device = {} if cuda else {"DS_ACCELERATOR": "cpu"}
    path = f"{binaries}{os.pathsep}{own.get('PATH', '')}"
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return own | quiet | device | {"OMP_NUM_THREADS": str(cores_per_process(ranks)), "PATH": path}
