"""What a peer is given and what it tells. The scripts beside this file import it, without smoltrain.

`python SCRIPT TASK.json` trains on the rows of a file and writes a line of JSON behind each step, and behind each
evaluation if it is to evaluate, under the names of smoltrain's metrics.jsonl. Suffixes of names are shapes: N rows of
all steps, B of a micro-batch, T tokens, S = T + 1.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

TASK: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
RANK = int(os.environ.get("RANK", "0"))
STEPS, MICRO_BATCH, ACCUMULATION = TASK["steps"], TASK["micro_batch"], TASK["accumulation"]
LRS: list[float] = TASK["lrs"]  # of each step, as smoltrain's schedule has them
VALIDATE_EVERY: int = TASK["validate_every"]  # steps; 0 never


def load_task_rows() -> torch.Tensor:
    """All rows in the order of the steps, [N, S] int64: in each, an id's target is the next one."""
    return torch.from_numpy(np.load(TASK["rows"])).long()


def load_validation_rows() -> torch.Tensor:
    """Rows that nobody trains on, [N, S] int64."""
    return torch.from_numpy(np.load(TASK["validation"])).long()


def find_validation_batch(num_rows: int) -> int:
    """The most rows at once, up to a micro-batch, that leave none over: then the mean of batches is that of tokens."""
    return max(size for size in range(1, MICRO_BATCH + 1) if num_rows % size == 0)


def write_step_line(step: int, loss: float, model: nn.Module) -> None:
    """One line of JSON, written by rank 0 when a step is done; the loss is the step's mean, in nats per token."""
    if RANK:
        return
    line: dict[str, Any] = {"step": step, "train/loss_nats_per_token": loss}
    if step == 1:
        line["parameters"] = sum(p.numel() for p in model.parameters())
    if TASK["device"] == "cuda":
        line["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    _write_line(line)


def write_validation_line(step: int, loss: float) -> None:
    """One line of JSON, written by rank 0 when an evaluation is done; the loss is in nats per token."""
    if not RANK:
        _write_line({"step": step, "validation/loss_nats_per_token": loss})


def _write_line(line: dict[str, Any]) -> None:
    with Path(TASK["lines"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def exit_at_once() -> None:
    """End the process at once: threads of distributed libraries abort now and then in a normal exit."""
    sys.stdout.flush()
    os._exit(0)
