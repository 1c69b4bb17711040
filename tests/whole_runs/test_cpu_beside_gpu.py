"""A run on the CPU of a machine that has a GPU leaves that alone: a context takes half a GiB of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

# Every way to CUDA leads through torch.cuda._lazy_init or torch._C._cuda_init; the calls are counted, for whoever makes
# one may catch what it raises. The rest is what torch says on a machine with a GPU that nobody has used yet.
PROGRAM = """
import sys, traceback
import torch
from torch.cuda import random as cuda_random
calls = []
def refuse(*_):
    calls.append("".join(traceback.format_stack(limit=8)))
    raise RuntimeError("CUDA was asked for")
for module in [module for name, module in sys.modules.items() if name.startswith("torch.cuda")]:
    if hasattr(module, "_lazy_init"):
        module._lazy_init = refuse
torch._C._cuda_init = refuse
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
import smoltrain
from smoltrain.config.load import load_config
words = sys.argv[1:]
smoltrain.train(load_config("quickstart", [*words, "run.stop_after=main"]))
run = smoltrain.train(load_config("quickstart", words))
assert run.is_finished
if calls:
    sys.exit("CUDA was asked for by\\n" + "\\n".join(calls))
"""
WORDS = [
    "engine.device=cpu", "phases.main.steps=2", "phases.main.warmup_steps=1", "phases.continuation.steps=1",
    "evaluate.every=1", "sample.every=1", "track.gradients_every=1",
]  # fmt: skip


@pytest.mark.slow
def test_no_cuda_call_is_made(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *tiny.words(tmp_path, *WORDS)], capture_output=True, text=True, check=False,
        cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"}, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
