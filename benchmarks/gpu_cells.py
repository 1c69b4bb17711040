"""The cells of a GPU's table, trained one after the other in this process: `python -m benchmarks.gpu_cells`.

It is started by benchmarks/gpu_table.py, and writes a line of JSON for each cell, as soon as it is done. What an error
has left on a GPU would spoil the cells behind it, so the process ends behind a cell that failed.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_task import FULL, TINY, GpuTask, MeasuredTraining, load_task_config, train_task
from benchmarks.launchers import describe_peer_task, divide_rows, trainer_environment
from benchmarks.peers import HERE, PEERS, PeerUnavailable, describe_peer_model
from benchmarks.random_rows import collect_first_rows
from benchmarks.watching import TrainerFailed, watch_trainer
from smoltrain.errors import UserError

MEASURED, REFUSED, NO_MEMORY, FAILED = "measured", "refused", "out of memory", "failed"  # what became of a cell


@dataclass(frozen=True)
class Cell:
    """A line of the table: ours with these overrides, or another trainer."""

    name: str
    words: tuple[str, ...] = ()
    peer: str | None = None  # of benchmarks.peers.PEERS


WHOLE = ("engine.compile=on", "engine.compile_region=model")
SHIPPED = Cell("ours, as shipped")
CELLS = (  # in the order of what one wants to know first; micro-batch 16 and ZeRO-2 are what is shipped
    SHIPPED,
    Cell("plain loop, torch.compile", peer="plain+compile"),
    Cell("Trainer", peer="hf-trainer"),
    Cell("gradients once a step", ("engine.reduce_gradients=step",)),
    Cell("gradients per micro-batch", ("engine.reduce_gradients=micro_batch",)),
    Cell("attention sdpa", ("engine.attention=sdpa",)),
    Cell("attention flash", ("engine.attention=flash",)),
    Cell("loss fused", ("engine.loss=fused",)),
    Cell("loss plain", ("engine.loss=plain",)),
    Cell("micro-batch 32", ("batch.micro_batch=32",)),
    Cell("micro-batch 64", ("batch.micro_batch=64",)),
    Cell("compile on", ("engine.compile=on",)),
    Cell("compile off", ("engine.compile=off",)),
    Cell("one compiled region", WHOLE),
    Cell("one compiled region, fused projections", (*WHOLE, "engine.fused_projections=true")),
    Cell("one compiled region, CUDA graphs", (*WHOLE, "engine.cuda_graphs=true")),
    Cell("checkpointing selective", ("engine.gradient_checkpointing=selective",)),
    Cell("checkpointing full", ("engine.gradient_checkpointing=full",)),
    Cell("ZeRO-1", ("engine.ds_config=zero1",)),
    Cell("ZeRO-3", ("engine.ds_config=zero3",)),
    Cell("ZeRO-0", ("engine.ds_config=zero0",)),
    Cell("document mask", ("packing.document_mask=true",)),
    Cell("Trainer, torch.compile", peer="hf-trainer+compile"),
    Cell("plain loop, eager", peer="plain"),
)
TINY_CELLS = (
    SHIPPED,
    Cell("plain loop, eager", peer="plain"),
    Cell("attention flash", ("engine.attention=flash",)),
    Cell("gradients per micro-batch", ("engine.reduce_gradients=micro_batch",)),
)


def list_cells(*, tiny: bool) -> tuple[Cell, ...]:
    """Of the real table, or of one that shows on a CPU that the script works."""
    return TINY_CELLS if tiny else CELLS


def run_cell(cell: Cell, task: GpuTask, data: Path, scratch: Path) -> dict[str, Any]:
    """What became of a cell: its "outcome", and the fields of MeasuredTraining or, in "why", the reason in a line."""
    folder = scratch / cell.name.replace(" ", "-").replace(",", "")
    try:
        if cell.peer:
            measured = train_peer(cell.peer, task, data, folder)
        else:
            measured = train_task(task, cell.words, data, folder)
    except UserError as error:
        return {"outcome": REFUSED, "why": f"{error.problems[0].what}: {error.problems[0].saw}"}
    except torch.OutOfMemoryError:
        return {"outcome": NO_MEMORY, "why": "the device has not enough memory"}
    except PeerUnavailable as error:
        return {"outcome": REFUSED, "why": str(error)}
    except TrainerFailed as error:
        return {"outcome": FAILED, "why": str(error)}
    except Exception as error:  # a kernel may raise anything, and the other cells are still to be measured
        first_line = (str(error).splitlines() or [""])[0]
        return {"outcome": FAILED, "why": f"{type(error).__name__}: {first_line}"}
    return {"outcome": MEASURED, **asdict(measured)}


def train_peer(name: str, task: GpuTask, data: Path, folder: Path) -> MeasuredTraining:
    """Another trainer on the same rows, with the packages of this environment; what it says goes to FOLDER.log.

    Errors: PeerUnavailable, TrainerFailed.
    """
    folder.mkdir(parents=True)
    config = load_task_config(task, (), data, folder)
    peer = PEERS[name]
    rows = folder.with_name("rows.npy")
    if not rows.exists():
        np.save(rows, collect_first_rows(config, task.num_steps, task.rows_per_step))
    accumulation = divide_rows(task.rows_per_step, task.micro_batch, 1)
    lines = folder / "lines.jsonl"
    described = describe_peer_task(config, task.num_steps, task.micro_batch, accumulation, rows)
    described |= describe_peer_model(peer, config.model) | {"lines": str(lines), "folder": str(folder / "out")}
    (folder / "task.json").write_text(json.dumps(described), encoding="utf-8")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
    command = [sys.executable, str(HERE / peer.script), str(folder / "task.json"), *peer.options]
    env = trainer_environment(Path(sys.executable).parent, 1, cuda=cuda)
    seen = watch_trainer(command, lines, task.num_steps, env, folder.with_suffix(".log"), cuda=cuda)
    return MeasuredTraining(
        step_s=sum(seen.step_s[task.warm_up :]) / task.steps,
        first_step_s=seen.start_s,
        peak_gib=seen.peak_gib,
        last_loss=seen.losses[-1],
        data_wait_share=None,
        save_pause_s=None,
        choices="as its users would",
    )


def run_cells() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scratch", type=Path, help="folder with the rows, in data; logs are left there")
    parser.add_argument("cells", nargs="+", help="their names")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    cells = {cell.name: cell for cell in list_cells(tiny=arguments.tiny)}
    task = TINY if arguments.tiny else FULL
    for name in arguments.cells:
        result = run_cell(cells[name], task, arguments.scratch / "data", arguments.scratch)
        print(json.dumps({"cell": name, **result}), flush=True)
        if result["outcome"] == FAILED:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_cells())
