"""Choose the attention kernel, the loss kernel and torch.compile for a device, with a reason for each."""

import math

import torch

from smoltrain.config.schema import Config, OwnModelSection
from smoltrain.kernels.attention import AttentionKernel, choose_attention_kernel
from smoltrain.kernels.compile import MIN_FLOP, CompileChoice, choose_compile
from smoltrain.kernels.loss import LossKernel, choose_loss_kernel
from smoltrain.kernels.precision import DTYPES
from smoltrain.model.build import decoder_head_width, model_attention_dropout
from smoltrain.model.interface import ComputeOptions
from smoltrain.schedule import count_planned_steps

ASSUMED = "taken to be installed"


def choose_kernels(
    config: Config, device: torch.device, precision: str, *, num_parameters: int, rows_per_step: int,
    assume_installed: bool = False,
) -> tuple[ComputeOptions, dict[str, str]]:  # fmt: skip
    """How the model computes, gradient checkpointing aside; and for each choice "which, why".

    With `assume_installed` the device is a CUDA device that may be elsewhere: flash-attn, Liger's loss and a compiler
    are taken to be installed there, and this machine is not asked. Errors: UserError for what cannot run on the device.
    """
    if isinstance(config.model, OwnModelSection):
        own = "off, the model is a program's own, and computes as it is written"
        names = ("attention kernel", "loss kernel", "torch.compile")
        return ComputeOptions(z_loss=config.optimizer.z_loss), dict.fromkeys(names, own)
    engine = config.engine
    dtype = DTYPES[precision]
    head_width = decoder_head_width(config.model)
    if assume_installed and engine.attention in ("auto", "flash") and dtype != torch.float32:
        attention = AttentionKernel("flash-attn", ASSUMED)
    else:
        attention = choose_attention_kernel(
            engine.attention, device, dtype, dropout=model_attention_dropout(config.model),
            document_mask=config.packing.document_mask, head_width=head_width,
        )  # fmt: skip
    if head_width is None:
        compiling = CompileChoice(False, "a model of transformers runs as it is written")
        loss = LossKernel("plain", "a model of transformers makes its logits itself")
    else:
        # 6 FLOP per parameter and token (Kaplan et al. 2020), over the whole plan: a resume computes as the run began.
        # Before the epochs of a plan are counted its length is not known, and taken to be worth it.
        steps = count_planned_steps(config.phases)
        tokens = math.inf if steps is None else steps * rows_per_step * config.batch.sequence_length
        flop = 6.0 * num_parameters * tokens
        if assume_installed and engine.compile != "off":
            compiling = CompileChoice(engine.compile == "on" or flop >= MIN_FLOP[device.type], ASSUMED)
        else:
            compiling = choose_compile(engine.compile, device, flop)
        z_loss = config.optimizer.z_loss
        if assume_installed and engine.loss == "auto" and dtype != torch.float16 and not z_loss:
            loss = LossKernel("liger", ASSUMED)
        else:
            loss = choose_loss_kernel(engine.loss, device, dtype, compiles=compiling.on, z_loss=z_loss)
    reasons = {
        "attention kernel": f"{attention.name}, {attention.reason}",
        "loss kernel": f"{loss.name}, {loss.reason}",
        "torch.compile": f"{'on' if compiling.on else 'off'}, {compiling.reason}",
    }
    options = ComputeOptions(attention=attention, loss=loss, z_loss=config.optimizer.z_loss, compiles=compiling.on)
    return options, reasons
