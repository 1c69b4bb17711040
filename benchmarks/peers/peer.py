"""What a peer is given and what it tells. The scripts beside this file import it, without smoltrain.

`python SCRIPT TASK.json` trains on the rows of a file and writes a line of JSON behind each step, under the names of
smoltrain's metrics.jsonl. Suffixes of names are shapes: N rows of all steps, B of a micro-batch, T tokens, S = T + 1.
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


def load_task_rows() -> torch.Tensor:
    """All rows in the order of the steps, [N, S] int64: in each, an id's target is the next one."""
    return torch.from_numpy(np.load(TASK["rows"])).long()


def write_step_line(step: int, loss: float, model: nn.Module) -> None:
    """One line of JSON, written by rank 0 when a step is done; the loss is the step's mean, in nats per token."""
    if RANK:
        return
    line: dict[str, Any] = {"step": step, "train/loss_nats_per_token": loss}
    if step == 1:
        line["parameters"] = sum(p.numel() for p in model.parameters())
    if TASK["device"] == "cuda":
        line["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    with Path(TASK["lines"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def exit_at_once() -> None:
    """End the process at once: threads of distributed libraries abort now and then in a normal exit."""
    sys.stdout.flush()
    os._exit(0)
