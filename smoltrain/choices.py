"""What a run leaves to the machine, settled in one place, each with its reason: precision, kernels, compiling."""

from dataclasses import dataclass, replace

import psutil
import torch

from smoltrain import compiling, ds_config, estimate, model
from smoltrain.dist import World
from smoltrain.model import attention, loss
from smoltrain.plan import Plan
from smoltrain.schema import Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Choices:
    """How this run computes; `reasons` are (what, which and why) for the console."""

    precision: str
    computing: model.Computing
    num_parameters: int
    reasons: dict[str, str]


def choose(config: Config, world: World, rows_per_step: int) -> Choices:
    """The same on every rank, and at every start of the same plan. Collective.

    Errors: UserError for what cannot run here.
    """
    engine, documents, device = config.engine, config.packing.document_mask, world.device
    precision, why = ds_config.choose_precision(engine.precision, device)
    num_parameters = model.parameter_count(model.build(config.model, device="meta"))
    # 6 per parameter and token (Kaplan et al. 2020), over the whole plan: a resume goes on as the run began.
    tokens = Plan(config.phases).last_step * rows_per_step * config.batch.sequence_length
    compiles = compiling.choose(engine.compile, device, 6.0 * num_parameters * tokens)
    ours = model.head_width(config.model) is not None
    if not ours:
        compiles = compiling.Choice(False, "a model of transformers runs as it is written")
    kernel = attention.choose(
        engine.attention, device, DTYPES[precision], dropout=model.attention_dropout(config.model),
        document_mask=documents, head_width=model.head_width(config.model),
    )  # fmt: skip
    head = loss.LossKernel("plain", "a model of transformers makes its logits itself")
    if ours:
        head = loss.choose(engine.loss, device, DTYPES[precision], compiles=compiles.on)
    computing = model.Computing("none", kernel, head, config.optimizer.z_loss, compiles.on)
    recompute, reason = engine.gradient_checkpointing, "as the recipe asks"
    if recompute == "auto":
        recompute, reason = world.on_first(lambda: _least(config, world, rows_per_step, precision, computing))
    return Choices(
        precision,
        replace(computing, gradient_checkpointing=recompute),
        num_parameters,
        {
            "precision": f"{precision}, {why}",
            "attention kernel": f"{kernel.name}, {kernel.reason}",
            "loss kernel": f"{head.name}, {head.reason}",
            "torch.compile": f"{'on' if compiles.on else 'off'}, {compiles.reason}",
            "gradient checkpointing": f"{recompute}, {reason}",
        },
    )


def _least(
    config: Config, world: World, rows_per_step: int, precision: str, computing: model.Computing
) -> tuple[estimate.Recompute, str]:
    """The least gradient checkpointing that fits a rank's memory by the estimate, and the reason."""
    kind = "cuda" if world.device.type == "cuda" else "cpu"
    memory = psutil.virtual_memory().total / world.local_size
    if kind == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    found = estimate.least_recomputation(
        config, memory, world.size, device=kind, rows_per_step=rows_per_step, precision=precision, computing=computing
    )
    return found, f"auto: the least that is estimated to fit {memory / 2**30:.0f} GiB a rank"
