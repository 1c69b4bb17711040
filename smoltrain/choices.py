"""What a run leaves to the machine, settled in one place, each with its reason: precision, kernels, compiling."""

from dataclasses import dataclass

import torch

from smoltrain import compiling, ds_config, model
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


def choose(config: Config, device: torch.device, rows_per_step: int) -> Choices:
    """The same on every rank, and at every start of the same plan. Errors: UserError for what cannot run here."""
    engine, documents = config.engine, config.packing.document_mask
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
    recompute = engine.gradient_checkpointing
    return Choices(
        precision,
        model.Computing(recompute, kernel, head, config.optimizer.z_loss, compiles.on),
        num_parameters,
        {
            "precision": f"{precision}, {why}",
            "attention kernel": f"{kernel.name}, {kernel.reason}",
            "loss kernel": f"{head.name}, {head.reason}",
            "torch.compile": f"{'on' if compiles.on else 'off'}, {compiles.reason}",
            "gradient checkpointing": f"{recompute}, as the recipe asks",
        },
    )
