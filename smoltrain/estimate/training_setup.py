"""What memory and time of a run depend on, as plain numbers: a config, on so many ranks of such a device."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, Unpack

import torch

from smoltrain.config.load import cut_micro_batch
from smoltrain.config.schema import AnyModelSection, Config, ModelSection, OwnModelSection
from smoltrain.engine.deepspeed_json import fill_deepspeed_config, with_zero_stage, zero_stage
from smoltrain.engine.hidden_matrices import split_parameters
from smoltrain.engine.optimizer import OPTIMIZERS
from smoltrain.engine.optimizer_kind import OptimizerKind
from smoltrain.engine.reduction import MemoryForSums, ReductionChoice, choose_reduction, gradient_sum_dtype
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.constants import DEFAULT_BUCKET_ELEMENTS
from smoltrain.kernels.precision import DTYPES, choose_precision
from smoltrain.model.build import build_model, count_parameters
from smoltrain.model.choose_kernels import choose_kernels
from smoltrain.model.interface import ComputeOptions
from smoltrain.schedule import Plan, count_planned_steps

DeviceKind = Literal["cuda", "cpu"]
Recompute = Literal["none", "selective", "full"] | int  # as engine.gradient_checkpointing


@dataclass(frozen=True)
class ModelShape:
    """A decoder's shape. Of a model of transformers it is what that one's config tells, the rest a Llama's."""

    parameters: int
    matmul_parameters: int  # those that a token is multiplied by: all but the tables that are looked up
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int  # width inside the MLP
    hidden_matrices: tuple[tuple[int, int], ...]  # sides of each, of which an optimizer may keep another state
    gated: bool = True
    rmsnorm: bool = True
    rotary: bool = True
    tied: bool = True
    dropout: bool = False

    @property
    def hidden_parameters(self) -> int:
        """Of `parameters`, those in hidden matrices."""
        return sum(rows * columns for rows, columns in self.hidden_matrices)

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest hidden matrix; 0 without any."""
        return max((rows * columns for rows, columns in self.hidden_matrices), default=0)

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.width // self.heads * self.kv_heads


@dataclass(frozen=True)
class TrainingSetup:
    """One way to train one model: ranks with a device each; on a CPU they share one machine."""

    shape: ModelShape
    device: DeviceKind
    world: int
    micro_batch: int  # rows
    length: int  # targets per row
    accumulation: int  # gradient accumulation: micro-batches of a rank and step
    stage: int  # of ZeRO
    precision: str  # bf16, fp16 or fp32
    recompute: Recompute = "none"
    attention: str = "sdpa"
    loss: str = "fused"
    compiled_blocks: bool = False
    compiled_whole: bool = False  # whether the compiled blocks are one region
    cuda_graphs: bool = False  # whether that region is replayed
    fused_projections: bool = False  # whether q, k, v are one product, and gate and up
    compiled_update: bool = True
    once_per_step: bool = True  # gradients are reduced once a step; else after each micro-batch
    reduce_gradients: str = "auto"  # what of the two is asked for: auto, step or micro_batch
    saves_midway: bool = False  # checkpoints are written while training goes on
    optimizer: OptimizerKind = OPTIMIZERS["adamw"]
    newton_schulz_steps: int = 0  # by which hidden matrices are orthogonalised; 0: they are not
    ds_config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # DeepSpeed's, filled

    @property
    def micro_batch_tokens(self) -> int:
        """Targets of a micro-batch."""
        return self.micro_batch * self.length

    @property
    def step_tokens(self) -> int:
        """Targets of a step, over all ranks."""
        return self.micro_batch_tokens * self.accumulation * self.world

    @property
    def weight_bytes(self) -> int:
        """Of one weight, or one activation."""
        return DTYPES[self.precision].itemsize

    @property
    def gradient_sum_bytes(self) -> int:
        """Of one element of the sum of gradients."""
        if not self.once_per_step:
            return torch.float32.itemsize
        return gradient_sum_dtype(DTYPES[self.precision], self.accumulation, self.world).itemsize

    @property
    def optimizer_state_bytes(self) -> int:
        """Of the optimizer's state over all ranks, without the master weights."""
        hidden = self.shape.hidden_parameters
        return self.optimizer.state_bytes(hidden, self.shape.parameters - hidden)

    @property
    def bucket(self) -> int:
        """Elements of DeepSpeed's bucket."""
        zero = self.ds_config.get("zero_optimization", {})
        return int(zero.get("reduce_bucket_size", DEFAULT_BUCKET_ELEMENTS))

    def choose_reduction(self, memory: MemoryForSums | None = None) -> ReductionChoice:
        """When its gradients are reduced, in such a memory; None: before that is looked at."""
        return choose_reduction(self.ds_config, device=self.device, requested=self.reduce_gradients, memory=memory)

    def with_zero_stage(self, stage: int) -> "TrainingSetup":
        """The same under another ZeRO stage; with engine.reduce_gradients as asked, where that stage can do it."""
        other = replace(self, stage=stage, ds_config=with_zero_stage(self.ds_config, stage))
        return replace(other, once_per_step=other.choose_reduction().once_per_step)

    def with_micro_batch(self, micro_batch: int) -> "TrainingSetup | None":
        """The same rows per step in micro-batches of another size; None where that does not divide them."""
        rows = self.micro_batch * self.accumulation
        if rows % micro_batch:
            return None
        return replace(self, micro_batch=micro_batch, accumulation=rows // micro_batch)


class Resolved(TypedDict, total=False):
    """What a run has resolved already and hands over; what is missing is resolved as it would be here."""

    rows_per_step: int
    precision: str
    computing: ComputeOptions


def build_training_setup(
    config: Config, *, world: int, device: DeviceKind, **resolved: Unpack[Resolved]
) -> TrainingSetup:
    """The setup that `smoltrain train` would run on so many devices, elsewhere or here.

    On CUDA a flash kernel, Liger's loss and a compiler are taken to be installed. What is still `auto` counts as
    micro-batches of one row, without recomputation, and with room for the sums of gradients (fitting.settle_reduction
    looks whether there is).
    Errors: UserError where the rows per step do not divide among the ranks, or a kernel cannot run.
    """
    rows = resolved.get("rows_per_step") or config.batch.rows(world)
    config = cut_micro_batch(config, rows, world)
    micro_batch = config.batch.micro_batch_rows
    if rows % (micro_batch * world):
        saw = f"{rows} rows on {world} ranks x {micro_batch}"
        want, change = "a micro-batch that divides a rank's share", "batch.micro_batch or the number of ranks"
        if rows % world:
            want, change = "a number of ranks that divides the rows", "the number of ranks, or batch.rows_per_step"
        raise UserError(Problem("the rows per step do not divide evenly", saw, want, change))
    accumulation = rows // (micro_batch * world)
    precision = resolved.get("precision") or _assume_precision(config.engine.precision, device)
    ds_config = fill_deepspeed_config(config, precision=precision, accumulation=accumulation, world_size=world)
    requested = config.engine.reduce_gradients
    shape = model_shape(config.model)
    computing = resolved.get("computing")
    if computing is None:
        computing, _ = choose_kernels(
            config, torch.device(device), precision, num_parameters=shape.parameters, rows_per_step=rows,
            assume_installed=device == "cuda",
        )  # fmt: skip
    recompute = config.engine.gradient_checkpointing
    return TrainingSetup(
        shape=shape, device=device, world=world, micro_batch=micro_batch, length=config.batch.sequence_length,
        accumulation=accumulation, stage=zero_stage(ds_config), precision=precision,
        recompute="none" if recompute == "auto" else recompute,
        attention=computing.attention.name if computing.attention else "sdpa", loss=computing.loss.name,
        compiled_blocks=computing.compiles and isinstance(config.model, ModelSection),
        compiled_whole=computing.compile_region == "model", cuda_graphs=computing.cuda_graphs,
        fused_projections=computing.fused_projections, compiled_update=computing.compiles,
        once_per_step=choose_reduction(ds_config, device=device, requested=requested).once_per_step,
        reduce_gradients=requested,
        saves_midway=_saves_midway(config), optimizer=OPTIMIZERS[config.optimizer.kind],
        newton_schulz_steps=config.optimizer.newton_schulz_steps if config.optimizer.kind == "muon" else 0,
        ds_config=ds_config,
    )  # fmt: skip


def model_shape(section: AnyModelSection) -> ModelShape:
    """The shape of a model, its parameters counted on the device 'meta'.

    Errors: UserError as build_model, and for a model of a program's own, of whose inside nothing is known.
    """
    if isinstance(section, OwnModelSection):
        want = "smoltrain's decoder, or a model of transformers"
        raise UserError(Problem("a model of a program's own cannot be estimated", section.class_name, want, "model"))
    model = build_model(section, device="meta")
    parameters = count_parameters(model)
    hidden = split_parameters(model).hidden.values()
    if isinstance(section, ModelSection):
        config: Any = section
        traits: dict[str, Any] = {
            "inner": config.intermediate_size, "gated": config.mlp == "swiglu", "rmsnorm": config.norm == "rmsnorm",
            "rotary": config.positions == "rope", "tied": config.tie_word_embeddings, "dropout": config.dropout > 0,
        }  # fmt: skip
    else:
        config = model.get_submodule("inner").config
        names = [name for name, _ in model.named_parameters()]
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        traits = {
            "inner": inner or 4 * config.hidden_size,
            "gated": any("gate" in name for name in names),
            "rmsnorm": not any("norm" in name and name.endswith("bias") for name in names),
            "rotary": not any("wpe" in name for name in names),
            "tied": bool(getattr(config, "tie_word_embeddings", True)),
        }
    looked_up = 0 if traits["rotary"] else config.max_position_embeddings * config.hidden_size
    if not traits["tied"]:
        looked_up += section.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    return ModelShape(
        parameters=parameters, matmul_parameters=parameters - looked_up,
        hidden_matrices=tuple((matrix.size(0), matrix.size(1)) for matrix in hidden),
        vocabulary=section.vocab_size, width=config.hidden_size, layers=config.num_hidden_layers, heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads, **traits,
    )  # fmt: skip


def _assume_precision(requested: str, device: DeviceKind) -> str:
    """As a run chooses it, on a GPU that computes bf16."""
    if device == "cuda" and requested == "auto":
        return "bf16"
    return choose_precision(requested, torch.device(device))[0]


def _saves_midway(config: Config) -> bool:
    """Whether a checkpoint is due before the last step; taken for granted where nobody has counted the steps."""
    if count_planned_steps(config.phases) is None:
        return True
    plan = Plan(config.phases)
    first_saves = [phase.last for phase in plan.phases]
    if config.checkpoint.every:
        first_saves.append(config.checkpoint.every)
    return min(first_saves) < plan.last_step
