"""What follows from a config on this machine, as plain values: what W&B and its like show beside the config.

A table of runs can be sorted and grouped by these; the console says the same with its reasons (describe.py).
"""

from typing import Any

import torch

from smoltrain.data.rows.loader import Loader
from smoltrain.distributed.world import World
from smoltrain.engine.engine import Engine
from smoltrain.training.mfu import MfuMeter
from smoltrain.training.resolve_auto import ResolvedSettings
from smoltrain.training.start import Start


def derive_facts(
    start: Start, settings: ResolvedSettings, loader: Loader, engine: Engine, world: World, mfu: MfuMeter
) -> dict[str, Any]:
    """Sizes, machine, kernels and versions of this start."""
    layout = loader.layout
    computing = settings.computing
    tokens_per_step = layout.rows_per_step * layout.sequence_length
    is_cuda = world.device.type == "cuda"
    newest = start.record.provenance["starts"][-1]
    return {
        "parameters": settings.num_parameters,
        "tokens_per_step": tokens_per_step,
        "rows_per_step": layout.rows_per_step,
        "micro_batch_rows": layout.micro_batch,
        "accumulation": layout.accumulation,
        "planned_steps": start.plan.last_step,
        "planned_tokens": start.plan.last_step * tokens_per_step,
        "world_size": world.size,
        "machines": world.num_machines,
        "device": torch.cuda.get_device_name(world.device) if is_cuda else world.device.type,
        "peak_flops_all_ranks": mfu.peak_flops,
        "model_flops_per_token": mfu.flops_per_token or None,
        "precision": settings.precision,
        "attention_kernel": computing.attention.name if computing.attention else None,
        "loss_kernel": computing.loss.name,
        "compiled": computing.compiles,
        "gradient_checkpointing": computing.gradient_checkpointing,
        "zero_stage": engine.stage,
        "gradient_reduction": engine.reduction,
        "resumed_from_step": start.point.step,
        "git_commit": newest["git_commit"],
        "versions": newest["versions"],
    }
