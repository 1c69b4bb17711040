"""A model wrapped by DeepSpeed: forward, backward, one update, shards in and out. The only importer of deepspeed."""

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smoltrain.config.schema import Config
from smoltrain.data.rows.loader import Batch
from smoltrain.distributed.world import World
from smoltrain.engine.deepspeed_json import GradientDtypes, fill_deepspeed_config, gradient_dtypes
from smoltrain.engine.once_per_step import OncePerStep
from smoltrain.engine.optimizer import weight_decay_groups
from smoltrain.engine.shards import SHARDS_FOLDER, ShardCheckpointEngine
from smoltrain.errors import Problem, UserError

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns and guesses
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import deepspeed
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad

# A C++ build of a minute that only CPU inference uses. (As an attribute, deepspeed.comm.torch is torch itself.)
setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010


def build_engine(
    model: torch.nn.Module, config: Config, world: World, *, precision: str, accumulation: int, compiles: bool = False
) -> "Engine":
    """Hand the model to DeepSpeed with AdamW and the recipe's numbers. Collective.

    `compiles`: whether torch.compile may be used. Errors: UserError where the DeepSpeed config contradicts the recipe.
    """
    tree = fill_deepspeed_config(config, precision=precision, accumulation=accumulation, world_size=world.size)
    model.to(world.device)
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model),
        lr=0.0,  # set before each update, from the plan
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        fused=world.device.type == "cuda",
    )
    with _silence_stdout(), _default_to_eager_backend():
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tree, dist_init_required=False)
    dtypes = gradient_dtypes(tree, precision)
    once, why = None, _reason_deepspeed_reduces(wrapped, config.engine.reduce_gradients, world.device, dtypes)
    if not why:
        clip = config.optimizer.gradient_clipping
        once = OncePerStep(wrapped.optimizer, world, accumulation=accumulation, clip=clip, compiles=compiles)
    return Engine(wrapped, dtypes, world, once, why)


def _reason_deepspeed_reduces(wrapped: Any, asked: str, device: torch.device, dtypes: GradientDtypes) -> str:
    """Why DeepSpeed reduces the gradients, and not OncePerStep; '' if that does. Errors: UserError."""
    optimizer, stage = wrapped.optimizer, int(wrapped.zero_optimization_stage())
    unfit = ""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        unfit = f"ZeRO-{stage} is computed by {type(optimizer).__name__}"
    elif optimizer.cpu_offload:
        unfit = "the optimizer is offloaded"
    elif dtypes != ("fp32", "fp32"):
        unfit = str(dtypes)
    elif wrapped.fp16_enabled():
        unfit = "fp16 has a loss scale"
    if unfit and asked == "step":
        want = "ZeRO-1 or 2 in fp32, ZeRO-2 in bf16, without offload; or auto"
        raise UserError(Problem("gradients cannot travel once a step", unfit, want, "engine.reduce_gradients"))
    if unfit or asked == "micro_batch":
        return unfit or "as engine.reduce_gradients asks"
    return "" if asked == "step" or device.type == "cpu" else "auto, on a GPU"


class Engine:
    """What the training loop needs of DeepSpeed, in the loop's words."""

    def __init__(
        self, wrapped: Any, dtypes: GradientDtypes, world: World, once: OncePerStep | None, why_not: str
    ) -> None:
        """`once` takes gradients and update over from DeepSpeed; where it is None, `why_not` says why."""
        self._ds, self._once = wrapped, once
        self._world = world
        # DeepSpeed's allreduce_gradients: under ZeRO-2 and 3 at each micro-batch, else at the step's last one.
        when = "after each micro-batch" if wrapped.zero_optimization_partition_gradients() else "once a step"
        self.reduction = f"once a step, {once.how}" if once else f"{when}, as DeepSpeed has it; {why_not}"
        self.gradient_reduction_summary = f"{dtypes}, {self.reduction}; master weights are fp32"
        self._ds.checkpoint_engine = ShardCheckpointEngine(wrapped, world)
        self._ds._copy_recovery_script = lambda _: None  # zero_to_fp32.py: fails on tied weights and unpickles anything
        self.stage = int(wrapped.zero_optimization_stage())
        if self.stage in (1, 2):
            wrapped.optimizer.check_grad_overflow = True  # DeepSpeed looks in bf16 and fp16 only, not in fp32
        self._deepspeed_skips_nonfinite = self.stage in (1, 2) or wrapped.fp16_enabled()
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
        batch = batch.to(self._ds.device)
        forward = self._ds.module if self._once else self._ds
        return forward(batch.ids_BT, batch.labels_BT, positions_BT=batch.positions_BT)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` up, for a mean over the ranks."""
        if self._once:
            (loss / self._world.size).backward()
            return
        self._ds.backward(loss, scale_wrt_gas=False)
        if not self._ds.is_gradient_accumulation_boundary():
            self._ds.step()  # DeepSpeed's word for "next micro-batch"; nothing moves before the boundary

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole fp32 gradient before clipping) of each parameter, between the last backward and `update`.

        Collective: every rank must run through all of them. W&B's own hooks would see one rank's local part.
        """
        whole = self._once.gradients() if self._once else {}
        for name, parameter in self.module.named_parameters():
            gradient = whole[parameter] if self._once else safe_get_full_grad(parameter)
            if gradient is not None:
                yield name, gradient.detach().float() / self.loss_scale

    def reduce(self) -> float:
        """Reduce the gradients; the squared L2 norm of this rank's part, 0 where `update` takes the norm itself."""
        return self._once.reduce() if self._once else 0.0

    def update(self, *, lr: float, weight_decay: float, squared_norm: float | None = None) -> bool:
        """Clip and take one AdamW step with these values; False if a non-finite gradient made every rank skip it.

        `squared_norm` is the sum over the ranks of what `reduce` gave; None: it is added up here.
        """
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        if self._once:
            if squared_norm is None:
                [squared_norm] = self._world.sum_floats(self._once.reduce())
            return self._update_once(self._once, math.sqrt(squared_norm))
        if self.stage == 0:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm_before_clipping = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale
        if not self._deepspeed_skips_nonfinite and self._has_nonfinite_gradient():
            self.drop_gradients()
            return False
        self._ds.step()
        if self.stage != 0:
            self._norm_before_clipping = float(self._ds.get_global_grad_norm())
        return self._ds.was_step_applied()

    def _update_once(self, once: OncePerStep, norm: float) -> bool:
        self._norm_before_clipping = norm
        if not math.isfinite(self._norm_before_clipping):
            self.drop_gradients()
            return False
        once.update(self._norm_before_clipping)
        self._ds.global_steps += 1  # which DeepSpeed writes into its files
        self._ds.global_samples += self._ds.train_batch_size()
        return True

    @property
    def grad_norm_before_clipping(self) -> float:
        """Global L2 norm of the gradient of the last `update`; inf if it was skipped."""
        return self._norm_before_clipping

    def _has_nonfinite_gradient(self) -> bool:
        if self.stage == 3:
            return bool(self._ds.optimizer.has_overflow())  # all-reduced by DeepSpeed
        return not math.isfinite(self._norm_before_clipping)

    def drop_gradients(self) -> None:
        """Forget what `backward` added up, as if it had not been: no weight moves, and no loss scale."""
        optimizer = self._ds.optimizer
        if self._once:
            self._once.drop()
        elif self.stage in (1, 2) and hasattr(optimizer, "has_overflow"):  # the step of a gradient that overflows
            optimizer.has_overflow, optimizer._update_scale = (lambda *_: True), (lambda *_: None)
            try:
                self._ds.step()
            finally:
                del optimizer.has_overflow, optimizer._update_scale
        elif self.stage == 3:
            optimizer._overflow_clean_up(self.loss_scale)
            self._ds.micro_steps += 1
        else:  # ZeRO-0; ZeRO-1 in bf16, which DeepSpeed computes with another optimizer
            optimizer.zero_grad()
            self._ds.micro_steps += 1
        self._norm_before_clipping = float("inf")

    def reset_optimizer(self) -> None:
        """Zero AdamW's moments and step counts, as if training began with these weights."""
        inner = getattr(self._ds.optimizer, "optimizer", self._ds.optimizer)
        for state in inner.state.values():
            for value in state.values():
                value.zero_()

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
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

    def training_state(self, folder: Path) -> dict[str, Any]:
        """What this rank must write into `folder`, by relative file name: weights, masters and moments. Collective.

        Makes the folders. The tensors are those in use: whoever keeps them over the next update copies them.
        """
        shards = self._ds.checkpoint_engine
        with _silence_stdout():
            self._ds.save_checkpoint(str(folder), tag=SHARDS_FOLDER, save_latest=False)
        return {str(Path(path).relative_to(folder)): state for path, state in shards.take_saved().items()}

    def load_shards(self, folder: Path, written_stage: int) -> None:
        """The inverse of `snapshot`, from any number of ranks and ZeRO-1, 2 or 3 to any. Collective.

        Masters, moments, step counts and an fp16 run's loss scale come from the disk; the compute weights are what this
        stage and precision make of the masters. The engine may have trained before.
        Errors: UserError where one of the stages is ZeRO-0, or the optimizer state is of a form that cannot be moved.
        """
        if self.stage != written_stage and 0 in (self.stage, written_stage):
            what, saw = f"{folder.name} is a checkpoint of another ZeRO stage", f"ZeRO-{self.stage}"
            want = "ZeRO-0" if written_stage == 0 else f"ZeRO-{written_stage}, or another but ZeRO-0"
            raise UserError(Problem(what, saw, want, "engine.ds_config"))
        model_states = sorted(str(p) for p in (folder / SHARDS_FOLDER).glob("*model_states.pt"))
        self._ds._get_all_ckpt_names = lambda *_: model_states[:1]  # ZeRO-3 has one per rank, all alike
        self._ds.checkpoint_engine.written_stage = written_stage
        with _silence_stdout():
            path, _ = self._ds.load_checkpoint(str(folder), tag=SHARDS_FOLDER)
            if self.stage in (1, 2):
                self._ds.optimizer.update_lp_params()  # ZeRO-3 does so itself
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}, though its manifest verified"


@contextlib.contextmanager
def _silence_stdout() -> Iterator[None]:
    """DeepSpeed prints its settings with `print`; they stand in the run's config.yaml already."""
    with contextlib.redirect_stdout(None):
        yield


@contextlib.contextmanager
def _default_to_eager_backend() -> Iterator[None]:
    """DeepSpeed imports its Muon, which hands functions to torch.compile: with inductor that is a second of imports."""
    set_default = getattr(torch.compiler, "set_default_backend", lambda _: None)  # since torch 2.13
    set_default("eager")
    try:
        yield
    finally:
        set_default(None)
