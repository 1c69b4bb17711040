"""A model wrapped by DeepSpeed: forward, backward, one update, shards in and out. The only importer of deepspeed."""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smoltrain import ds_config, files, reshape
from smoltrain.data import Batch
from smoltrain.dist import World
from smoltrain.errors import Problem, UserError
from smoltrain.schema import Config

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns and guesses
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import deepspeed
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.tensor_fragment import fragment_address

# A C++ build of a minute that only CPU inference uses. (As an attribute, deepspeed.comm.torch is torch itself.)
setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
SHARDS = "deepspeed"  # the folder of DeepSpeed's files inside a checkpoint
ALLOWED = (
    LossScaler,
    DynamicLossScaler,
    ZeroStageEnum,
    fragment_address,
)  # the only classes that DeepSpeed's shards may hold


def wrap(model: torch.nn.Module, config: Config, world: World, *, precision: str, accumulation: int) -> "Engine":
    """Hand the model to DeepSpeed with AdamW and the recipe's numbers. Collective.

    Errors: UserError where the DeepSpeed config contradicts the recipe.
    """
    tree = ds_config.fill(config, precision=precision, accumulation=accumulation, world_size=world.size)
    model.to(world.device)
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model),
        lr=0.0,  # set before each update, from the plan
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        fused=world.device.type == "cuda",
    )
    with _quiet():
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tree, dist_init_required=False)
    return Engine(wrapped, ds_config.dtypes(tree, precision))


def weight_decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: matrices (embeddings too) decay, vectors (norms, biases) never do."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "decays": True},
        {"params": [p for p in parameters if p.dim() < 2], "decays": False},
    ]


class Engine:
    """What the training loop needs of DeepSpeed, in the loop's words."""

    def __init__(self, wrapped: Any, dtypes: str) -> None:
        self._ds = wrapped
        self.dtypes = dtypes
        self._ds.checkpoint_engine = _Shards(wrapped)
        self._ds._copy_recovery_script = lambda _: None  # zero_to_fp32.py: fails on tied weights and unpickles anything
        self.stage = int(wrapped.zero_optimization_stage())
        if self.stage in (1, 2):
            wrapped.optimizer.check_grad_overflow = True  # DeepSpeed looks in bf16 and fp16 only, not in fp32
        self._skips_itself = self.stage in (1, 2) or wrapped.fp16_enabled()
        self._norm_before_clipping = float("nan")

    @property
    def module(self) -> Any:
        """The model itself, without DeepSpeed's forward."""
        return self._ds.module

    @property
    def loss_scale(self) -> float:
        """The factor inside fp16 gradients; 1 in any other precision."""
        return float(self._ds.optimizer.loss_scale) if self._ds.fp16_enabled() else 1.0

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the token losses of one micro-batch on this rank: fp32 scalar, nats."""
        device, positions_BT = self._ds.device, batch.positions_BT
        positions_BT = None if positions_BT is None else positions_BT.to(device)
        return self._ds(batch.ids_BT.to(device), batch.labels_BT.to(device), positions_BT=positions_BT)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` up. DeepSpeed averages over ranks; the caller has scaled for that."""
        self._ds.backward(loss, scale_wrt_gas=False)
        if not self._ds.is_gradient_accumulation_boundary():
            self._ds.step()  # DeepSpeed's word for "next micro-batch"; nothing moves before the boundary

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole fp32 gradient before clipping) of each parameter, between the last backward and `update`.

        Collective: every rank must run through all of them. W&B's own hooks would see one rank's local part.
        """
        for name, parameter in self.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                yield name, gradient.detach().float() / self.loss_scale

    def update(self, *, lr: float, weight_decay: float) -> bool:
        """Clip and take one AdamW step with these values; False if a non-finite gradient made every rank skip it."""
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        if self.stage == 0:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm_before_clipping = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale
        if not self._skips_itself and self._has_bad_gradient():
            self._drop_gradients()
            return False
        self._ds.step()
        if self.stage != 0:
            self._norm_before_clipping = float(self._ds.get_global_grad_norm())
        return self._ds.was_step_applied()

    @property
    def grad_norm_before_clipping(self) -> float:
        """Global L2 norm of the gradient of the last `update`; inf if it was skipped."""
        return self._norm_before_clipping

    def _has_bad_gradient(self) -> bool:
        if self.stage == 3:
            return bool(self._ds.optimizer.has_overflow())  # all-reduced by DeepSpeed
        return not torch.isfinite(torch.tensor(self._norm_before_clipping)).item()

    def _drop_gradients(self) -> None:
        self._ds.optimizer.zero_grad()
        if self.stage == 3:
            self._ds.optimizer.averaged_gradients = {}
        self._ds.micro_steps += 1
        self._norm_before_clipping = float("inf")

    def reset_optimizer(self) -> None:
        """Zero AdamW's moments and step counts, as if training began with these weights."""
        inner = getattr(self._ds.optimizer, "optimizer", self._ds.optimizer)
        for state in inner.state.values():
            for value in state.values():
                value.zero_()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout and no gradients inside."""
        self._ds.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._ds.train()

    def weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """The model's state dict on the host, tied tensors once; {} where not `keep`. Collective under ZeRO-3."""
        parameters = list(self.module.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            if not keep:
                return {}
            own = dict(self.module.named_parameters())  # which gives a tied tensor once
            tied = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
            own |= {name: b for name, b in self.module.state_dict().items() if name not in tied}  # persistent buffers
            return {name: value.detach().to("cpu", copy=True) for name, value in own.items()}

    def checkpoint_bytes(self) -> int:
        """About what one checkpoint takes on disk: compute weights twice, fp32 masters and both moments once."""
        count = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
        return count * (2 * next(self.module.parameters()).element_size() + 12)

    def save_shards(self, folder: Path) -> None:
        """Write this rank's part of weights, masters and moments under folder/deepspeed. Collective."""
        with _quiet():
            self._ds.save_checkpoint(str(folder), tag=SHARDS, save_latest=False)

    def load_shards(self, folder: Path) -> None:
        """The inverse of `save_shards`, on any number of ranks; ZeRO-1 and ZeRO-2 read each other's. Collective.

        Errors: UserError where the DeepSpeed config lays the optimizer state out in another order.
        """
        model_states = sorted(str(p) for p in (folder / SHARDS).glob("*model_states.pt"))
        self._ds._get_all_ckpt_names = lambda *_: model_states[:1]  # ZeRO-3 has one per rank, all alike
        with _quiet():
            path, _ = self._ds.load_checkpoint(str(folder), tag=SHARDS)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}, though its manifest verified"


class _Shards(CheckpointEngine):
    """DeepSpeed's file access: no pickle can run code, and what other ranks wrote is cut anew for these."""

    def __init__(self, wrapped: Any) -> None:
        self._ds = wrapped
        self._written_by = 0  # ranks

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file; checkpoint.py syncs and hashes it."""
        torch.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:  # noqa: ARG002
        """What this rank would have written to `path`, read with weights_only. The model's file comes first."""
        if path.endswith("_optim_states.pt"):
            return self._optimizer_state(Path(path))
        state = files.read_tensors(Path(path), ALLOWED)
        self._written_by, state["dp_world_size"] = state["dp_world_size"], self._ds.dp_world_size
        if self._ds.zero_optimization() and state["param_shapes"] != self._ds._get_zero_param_shapes():
            what, saw = "the optimizer state on disk is in another order", f"that of {self._ds.dp_world_size} ranks"
            want = f"that of {self._written_by} ranks: no round_robin_gradients, and sub_group_size as it was"
            raise UserError(Problem(what, saw, want, "zero_optimization in engine.ds_config, or the number of ranks"))
        return state

    def _optimizer_state(self, path: Path) -> Any:
        old, new, rank = self._written_by, self._ds.dp_world_size, self._ds.global_rank
        if old == new:
            return files.read_tensors(path, ALLOWED)
        layouts = self._layouts()
        shards = {
            source: files.read_tensors(path.with_name(path.name.replace(f"_{rank}_mp_", f"_{source}_mp_")), ALLOWED)
            for source in reshape.sources(layouts, old, new, rank)
        }
        states = {source: shard["optimizer_state_dict"] for source, shard in shards.items()}
        return {"optimizer_state_dict": reshape.shard(states, layouts, old, new, rank)}

    def _layouts(self) -> list[reshape.Layout]:
        sizes = [[shape.numel() for shape in group.values()] for group in self._ds._get_zero_param_shapes()]
        optimizer = self._ds.optimizer
        if self._ds.zero_optimization_stage() == 3:
            return [reshape.Layout(tuple(group), alignment=1) for group in sizes]
        gaps = getattr(optimizer, "round_robin_bit16_padding", [[]] * len(sizes))  # with parameter_alignment
        alignment = optimizer.nccl_start_alignment_factor
        return [reshape.Layout((sum(group) + sum(gap),), alignment) for group, gap in zip(sizes, gaps, strict=True)]

    def commit(self, info: Any) -> None:
        """checkpoint.py publishes the folder, when every rank is done."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its settings with `print`; they stand in the run's config.yaml already."""
    with contextlib.redirect_stdout(None):
        yield
