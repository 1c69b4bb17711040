"""Choose the attention kernel, the loss kernel and torch.compile for a device, with a reason for each."""

import math

import torch

from smoltrain.config.schema import Config, EngineSection, ModelSection, OwnModelSection
from smoltrain.errors import Problem, UserError
from smoltrain.kernels.attention import AttentionKernel, choose_attention_kernel
from smoltrain.kernels.compile import choose_compile
from smoltrain.kernels.compile_gain import CompileChoice, weigh_compiling
from smoltrain.kernels.loss import LossKernel, choose_loss_kernel
from smoltrain.kernels.precision import DTYPES
from smoltrain.model.build import decoder_head_width, model_attention_dropout
from smoltrain.model.flops import flops_per_token
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
    if not isinstance(config.model, ModelSection):
        compiling = CompileChoice(False, "a model of transformers runs as it is written")
        loss = LossKernel("plain", "a model of transformers makes its logits itself")
    else:
        # Of the whole plan: a resume computes as the run began. Before its epochs are counted the length is not known.
        steps = count_planned_steps(config.phases)
        T = config.batch.sequence_length
        tokens = math.inf if steps is None else steps * rows_per_step * T
        shape = config.model
        flop = tokens * flops_per_token(num_parameters, shape.num_hidden_layers, shape.hidden_size, T)
        if assume_installed and engine.compile != "off":
            pays = weigh_compiling(device.type, flop, engine.compile_region).on
            compiling = CompileChoice(engine.compile == "on" or pays, ASSUMED)
        else:
            compiling = choose_compile(engine.compile, device, flop, engine.compile_region)
        z_loss = config.optimizer.z_loss
        if assume_installed and engine.loss == "auto" and dtype != torch.float16 and not z_loss:
            loss = LossKernel("liger", ASSUMED)
        else:
            loss = choose_loss_kernel(engine.loss, device, dtype, compiles=compiling.on, z_loss=z_loss)
    if engine.cuda_graphs and device.type != "cuda":
        raise UserError(Problem("CUDA graphs need a GPU", f"device {device.type}", "false", "engine.cuda_graphs"))
    how = _describe_regions(engine) if compiling.on else "off"
    reasons = {
        "attention kernel": f"{attention.name}, {attention.reason}",
        "loss kernel": f"{loss.name}, {loss.reason}",
        "torch.compile": f"{how}, {compiling.reason}",
    }
    if engine.fused_projections:
        reasons["projections"] = "q, k, v as one product, gate and up as one, as engine.fused_projections asks"
    options = ComputeOptions(
        attention=attention, loss=loss, z_loss=config.optimizer.z_loss,
        compiles=compiling.on, compile_region=engine.compile_region, cuda_graphs=engine.cuda_graphs,
        fused_projections=engine.fused_projections,
    )  # fmt: skip
    return options, reasons


def _describe_regions(engine: EngineSection) -> str:
    if engine.cuda_graphs:
        return "on, all blocks as one region, replayed as CUDA graphs"
    return "on, all blocks as one region" if engine.compile_region == "model" else "on"
