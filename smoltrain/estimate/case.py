"""What memory and time of a run depend on, as plain numbers: a config, on so many ranks of such a device."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from smoltrain.config.schema import Config, ModelSection, TransformersSection
from smoltrain.engine.deepspeed_json import fill_deepspeed_config, with_zero_stage, zero_stage
from smoltrain.engine.optimizer import OPTIMIZERS, OptimizerKind
from smoltrain.engine.reduction import choose_reduction, gradient_sum_dtype
from smoltrain.errors import Problem, UserError
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.loss import PLAIN_LOSS, LossKernel, choose_loss_kernel
from smoltrain.kernels.precision import DTYPES, choose_precision
from smoltrain.model.build import build_model, count_parameters
from smoltrain.model.choose_kernels import choose_kernels
from smoltrain.model.interface import ComputeOptions
from smoltrain.schedule import Plan

Recompute = Literal["none", "selective", "full"] | int  # as model.Computing has it
CPU = torch.device("cpu")
DEFAULT_BUCKET_ELEMENTS = 500_000_000  # elements: DeepSpeed's default of zero_optimization.reduce_bucket_size


@dataclass(frozen=True)
class ModelShape:
    """A decoder's shape. Of a model of transformers it is what that one's config tells, the rest a Llama's."""

    parameters: int
    matmul_parameters: int  # those that a token is multiplied by: all matrices but the tables that are looked up
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int  # width inside the MLP
    gated: bool = True
    rmsnorm: bool = True
    rotary: bool = True
    tied: bool = True
    dropout: bool = False

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.width // self.heads * self.kv_heads


@dataclass(frozen=True)
class TrainingSetup:
    """One way to train one model. `world` ranks, each with a device of its own; on a CPU they share one machine."""

    shape: ModelShape
    device: Literal["cuda", "cpu"]
    world: int
    micro_batch: int
    length: int  # targets per row
    accumulation: int
    stage: int
    precision: str  # bf16, fp16 or fp32
    recompute: Recompute = "none"
    attention: str = "sdpa"
    loss: str = "fused"
    compiled_blocks: bool = False
    compiled_update: bool = True
    once_a_step: bool = True  # gradients travel; else after each micro-batch
    bucket: int = DEFAULT_BUCKET_ELEMENTS
    saves: bool = False  # before its end, while training goes on
    optimizer: str = "adamw"  # a name of engine/optimizer.py
    ds_config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # DeepSpeed's, filled

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """What there is to know of the optimizer."""
        return OPTIMIZERS[self.optimizer]

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.length

    @property
    def weight_bytes(self) -> int:
        """Of one weight, or one activation."""
        return DTYPES[self.precision].itemsize

    @property
    def gradient_sum_bytes(self) -> int:
        """Of one element of the sum of gradients."""
        if not self.once_a_step:
            return torch.float32.itemsize
        return gradient_sum_dtype(DTYPES[self.precision], self.accumulation, self.world).itemsize

    @property
    def uses_bucket(self) -> bool:
        """Whether DeepSpeed gathers gradients in a bucket before they travel."""
        return not self.once_a_step and (self.stage >= 2 or (self.stage == 1 and self.precision != "bf16"))

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.tokens * self.accumulation * self.world

    def with_zero_stage(self, stage: int, reduce_gradients: str = "auto") -> "TrainingSetup":
        """The same under another ZeRO stage; with engine.reduce_gradients as asked, where that stage can do it."""
        tree = with_zero_stage(self.ds_config, stage)
        choice = choose_reduction(tree, device=self.device, requested=reduce_gradients)
        return replace(self, stage=stage, once_a_step=choice.once_per_step, ds_config=tree)

    def split(self, micro_batch: int) -> "TrainingSetup | None":
        """The same rows per step in micro-batches of another size; None where that does not divide them."""
        rows = self.micro_batch * self.accumulation
        if rows % micro_batch:
            return None
        return replace(self, micro_batch=micro_batch, accumulation=rows // micro_batch)


def build_training_setup(
    config: Config, *, world: int, device: Literal["cuda", "cpu"], rows_per_step: int | None = None,
    precision: str | None = None, computing: ComputeOptions | None = None,
) -> TrainingSetup:  # fmt: skip
    """The case that `smoltrain train` would run on so many devices, elsewhere or here.

    A run that has settled its rows per step, precision and kernels hands them over; else they are settled as they would
    be here, but for CUDA, where a flash kernel, Liger's loss and a compiler are taken to be installed. What is still
    `auto` counts as micro-batches of one row, without recomputation.
    Errors: UserError where the rows per step do not divide among the ranks, or a kernel cannot run.
    """
    batch, engine = config.batch, config.engine
    micro, recompute = batch.micro_batch_rows, engine.gradient_checkpointing
    rows = rows_per_step or batch.rows(world)
    if rows % (micro * world):
        saw, want = f"{rows} rows on {world} ranks x {micro}", "a micro-batch that divides a rank's share"
        raise UserError(Problem("the rows per step do not divide evenly", saw, want, "batch.micro_batch or --world"))
    precision = precision or _assumed_precision(engine.precision, device)
    tree = fill_deepspeed_config(config, precision=precision, accumulation=rows // (micro * world), world_size=world)
    stage, size = zero_stage(tree), model_shape(config.model)
    plan = Plan(config.phases)
    if computing is None and device == "cuda":
        computing = _assumed_cuda_kernels(config, precision)
    elif computing is None:
        computing, _ = choose_kernels(config, CPU, precision, num_parameters=size.parameters, rows_per_step=rows)
    kernel = computing.attention.name if computing.attention else "sdpa"
    return TrainingSetup(
        shape=size, device=device, world=world, micro_batch=micro, length=batch.sequence_length,
        accumulation=rows // (micro * world), stage=stage, precision=precision,
        recompute="none" if recompute == "auto" else recompute, attention=kernel, loss=computing.loss.name,
        compiled_blocks=computing.compiles and isinstance(config.model, ModelSection),
        compiled_update=computing.compiles,
        once_a_step=choose_reduction(tree, device=device, requested=engine.reduce_gradients).once_per_step,
        bucket=int(tree.get("zero_optimization", {}).get("reduce_bucket_size", DEFAULT_BUCKET_ELEMENTS)),
        saves=plan.last_step > min([phase.last for phase in plan.phases] + [config.checkpoint.every or plan.last_step]),
        optimizer=config.optimizer.name, ds_config=tree,
    )  # fmt: skip


def model_shape(section: ModelSection | TransformersSection) -> ModelShape:
    """The shape of a model, its parameters counted on the device 'meta'. Errors: UserError as model.build."""
    built = build_model(section, device="meta")
    parameters = count_parameters(built)
    if isinstance(section, ModelSection):
        m: Any = section
        gated, rmsnorm, rotary = m.mlp == "swiglu", m.norm == "rmsnorm", m.positions == "rope"
        tied, dropout, inner = m.tie_word_embeddings, m.dropout > 0, m.intermediate_size
    else:
        m = built.get_submodule("inner").config
        names = [name for name, _ in built.named_parameters()]
        gated, rotary = any("gate" in name for name in names), not any("wpe" in name for name in names)
        rmsnorm = not any("norm" in name and name.endswith("bias") for name in names)
        tied, dropout = bool(getattr(m, "tie_word_embeddings", True)), False
        inner = getattr(m, "intermediate_size", None) or getattr(m, "n_inner", None) or 4 * m.hidden_size
    looked_up = m.max_position_embeddings * m.hidden_size if not rotary else 0
    if not tied:
        looked_up += section.vocab_size * m.hidden_size
    heads = m.num_attention_heads
    return ModelShape(
        parameters, parameters - looked_up, section.vocab_size, m.hidden_size, m.num_hidden_layers, heads,
        getattr(m, "num_key_value_heads", None) or heads, inner, gated, rmsnorm, rotary, tied, dropout,
    )  # fmt: skip


def _assumed_precision(asked: Literal["auto", "bf16", "fp16", "fp32"], device: str) -> str:
    """As ds_config.choose_precision settles it, on a GPU that computes bf16."""
    if device == "cpu":
        return choose_precision(asked, CPU)[0]
    return "bf16" if asked == "auto" else asked


def _assumed_cuda_kernels(config: Config, precision: str) -> ComputeOptions:
    """As kernels.settle settles it where a flash kernel, Liger's loss and a compiler are installed."""
    engine, ours = config.engine, isinstance(config.model, ModelSection)
    kernel = AttentionKernel("math" if engine.attention == "math" else "flash-attn", "of a GPU that may be elsewhere")
    compiles = ours and engine.compile != "off"
    if not ours:
        head = PLAIN_LOSS
    elif precision == "fp16" or engine.loss != "auto":
        head = choose_loss_kernel(engine.loss, CPU, DTYPES[precision], compiles=compiles)
    else:
        head = LossKernel("liger", "likewise")
    return ComputeOptions(attention=kernel, loss=head, compiles=compiles)
