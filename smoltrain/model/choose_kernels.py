"""By which kernels a model computes on a device, each with its reason: attention, the loss, torch.compile."""

import torch

from smoltrain.config.schema import Config
from smoltrain.kernels.attention import choose_attention_kernel
from smoltrain.kernels.compile import CompileChoice, choose_compile
from smoltrain.kernels.loss import LossKernel, choose_loss_kernel
from smoltrain.kernels.precision import DTYPES
from smoltrain.model.build import decoder_head_width, model_attention_dropout
from smoltrain.model.interface import ComputeOptions
from smoltrain.schedule import Plan


def choose_kernels(
    config: Config, device: torch.device, precision: str, *, num_parameters: int, rows_per_step: int
) -> tuple[ComputeOptions, dict[str, str]]:
    """How the model computes, gradient checkpointing aside; and (what, which and why).

    Errors: UserError for what cannot run on the device.
    """
    engine, dtype, head_width = config.engine, DTYPES[precision], decoder_head_width(config.model)
    kernel = choose_attention_kernel(
        engine.attention, device, dtype, dropout=model_attention_dropout(config.model),
        document_mask=config.packing.document_mask, head_width=head_width,
    )  # fmt: skip
    if head_width is None:
        compiles = CompileChoice(False, "a model of transformers runs as it is written")
        head = LossKernel("plain", "a model of transformers makes its logits itself")
    else:
        # 6 per parameter and token (Kaplan et al. 2020), over the whole plan: a resume goes on as the run began.
        tokens = Plan(config.phases).last_step * rows_per_step * config.batch.sequence_length
        compiles = choose_compile(engine.compile, device, 6.0 * num_parameters * tokens)
        head = choose_loss_kernel(engine.loss, device, dtype, compiles=compiles.on)
    reasons = {
        "attention kernel": f"{kernel.name}, {kernel.reason}",
        "loss kernel": f"{head.name}, {head.reason}",
        "torch.compile": f"{'on' if compiles.on else 'off'}, {compiles.reason}",
    }
    return ComputeOptions("none", kernel, head, config.optimizer.z_loss, compiles.on), reasons
