"""What a start costs, in facts that no busy machine changes: modules, compiled graphs, hits in the compiler's cache."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smoltrain.kernels.compile import missing_for_compile
from tests import launches
from tests.launches import ROOT

# What takes a tenth of a second and more to import, and is of no use before the first step.
NEVER = {
    "accelerate", "aiohttp", "datasets", "gradio", "huggingface_hub", "IPython", "matplotlib", "pandas", "scipy",
    "transformers", "triton.compiler",
}  # fmt: skip
NOT_IN_THE_SUPERVISOR = NEVER | {"deepspeed", "torch._dynamo", "torch._inductor", "sympy", "wandb"}

# A start up to where the supervisor would start its ranks, then the imports of a rank.
IMPORTS = """
import json, sys
import torch
from smoltrain.config.load import load_config
from smoltrain.launch import supervisor
from smoltrain.training.preflight import check_start
config = load_config("quickstart", [])
check_start(config, torch.device("cpu"), 2, config.batch.rows(2))
before = sorted(sys.modules)
import smoltrain.training.run
print(json.dumps([before, sorted(sys.modules)]))
"""

# A rank as it is, but for what it tells of its compiler when it has made its last step.
RANK = """
import json, sys
from smoltrain.launch import rank
code = rank.run_rank(sys.argv[1:])
from torch._dynamo.utils import counters
told = {name: dict(counters[name]) for name in ("stats", "inductor", "aot_autograd")}
print(json.dumps({"modules": sorted(sys.modules), **told}))
sys.stdout.flush()
sys.exit(code)
"""
TINY = (
    "model.hidden_size=32", "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.intermediate_size=48",
    "batch.sequence_length=32", "batch.micro_batch=2", "batch.accumulation=1", "phases.main.steps=3",
    "phases.main.warmup_steps=1", "run.stop_after=main", "evaluate.every=0", "sample.every=0", "checkpoint.every=0",
    "track.gradients_every=0", "track.wandb=off", "engine.gradient_checkpointing=none",
)  # fmt: skip


def train_one_rank(folder: Path, name: str, *words: str) -> tuple[dict[str, Any], dict[int, float], str]:
    """(what the compiler counted, losses, what was said) of a short run in a process of its own."""
    run_folder = folder / name
    command = [sys.executable, "-c", RANK, "quickstart", *TINY, f"run.folder={folder}", f"run.name={name}"]
    env = launches.environment() | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    return told, launches.losses(run_folder), done.stdout


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=ROOT, check=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    before, rank = map(set, json.loads(done.stdout.splitlines()[-1]))
    assert not before & NOT_IN_THE_SUPERVISOR
    assert not rank & (NEVER | {"torch._dynamo", "torch._inductor", "sympy", "wandb"})


@pytest.mark.slow
@pytest.mark.skipif(missing_for_compile("cpu") is not None, reason="nothing is compiled without a compiler")
@pytest.mark.parametrize(("kind", "graphs"), [("adamw", 5), ("muon", 7)])
def test_a_step_is_few_graphs_and_a_warm_start_compiles_none_of_them(kind: str, graphs: int, tmp_path: Path) -> None:
    """And computes the same bits. The norm is there twice, as the vectors of so small a model have few elements."""
    words = ("engine.compile=on", "engine.precision=bf16", f"optimizer.kind={kind}")
    cold, losses, said = train_one_rank(tmp_path, "cold", *words)
    assert "made before the first step" in said
    # A block, the softmax of the loss, AdamW's update, the norm twice; Muon's passes before and after its iterations.
    assert cold["stats"]["unique_graphs"] == graphs
    assert cold["aot_autograd"]["autograd_cache_miss"] == graphs
    assert cold["inductor"]["fxgraph_cache_miss"] == graphs + 1, "the block's backward too"
    warm, again, said = train_one_rank(tmp_path, "warm", *words)
    assert "loaded from" in said
    assert warm["aot_autograd"]["autograd_cache_hit"] == graphs
    assert "autograd_cache_miss" not in warm["aot_autograd"]
    assert "fxgraph_cache_miss" not in warm["inductor"]
    assert len(losses) == 3
    assert again == losses


@pytest.mark.slow
def test_a_rank_has_nothing_of_no_use_when_it_has_trained(tmp_path: Path) -> None:
    told, losses, _ = train_one_rank(tmp_path, "eager", "engine.compile=off", "phases.main.steps=2")
    assert len(losses) == 2
    assert not set(told["modules"]) & (NEVER - {"matplotlib"})  # which has drawn its plots
    assert "unique_graphs" not in told["stats"]
