"""By which kernels a model computes on a device, each with its reason: attention, the loss, torch.compile."""

import torch

from smoltrain import compiling, model
from smoltrain.ds_config import DTYPES
from smoltrain.model import attention, loss
from smoltrain.plan import Plan
from smoltrain.schema import Config


def settle(
    config: Config, device: torch.device, precision: str, *, num_parameters: int, rows_per_step: int
) -> tuple[model.Computing, dict[str, str]]:
    """How the model computes, gradient checkpointing aside; and (what, which and why).

    Errors: UserError for what cannot run on the device.
    """
    engine, dtype, head_width = config.engine, DTYPES[precision], model.head_width(config.model)
    kernel = attention.choose(
        engine.attention, device, dtype, dropout=model.attention_dropout(config.model),
        document_mask=config.packing.document_mask, head_width=head_width,
    )  # fmt: skip
    if head_width is None:
        compiles = compiling.Choice(False, "a model of transformers runs as it is written")
        head = loss.LossKernel("plain", "a model of transformers makes its logits itself")
    else:
        # 6 per parameter and token (Kaplan et al. 2020), over the whole plan: a resume goes on as the run began.
        tokens = Plan(config.phases).last_step * rows_per_step * config.batch.sequence_length
        compiles = compiling.choose(engine.compile, device, 6.0 * num_parameters * tokens)
        head = loss.choose(engine.loss, device, dtype, compiles=compiles.on)
    reasons = {
        "attention kernel": f"{kernel.name}, {kernel.reason}",
        "loss kernel": f"{head.name}, {head.reason}",
        "torch.compile": f"{'on' if compiles.on else 'off'}, {compiles.reason}",
    }
    return model.Computing("none", kernel, head, config.optimizer.z_loss, compiles.on), reasons
