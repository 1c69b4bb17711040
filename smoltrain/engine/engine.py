"""A model that trains: forward, backward, one update, its state in and out. What the loop sees of DeepSpeed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smoltrain.data.rows.batch import Batch
from smoltrain.distributed.world import World
from smoltrain.engine.deepspeed_private import deepspeed
from smoltrain.engine.held_tensors import list_engine_tensors
from smoltrain.engine.layer_weights import UpdateMeter
from smoltrain.engine.master_weights import MasterWeights
from smoltrain.engine.optimizer import reset_optimizer_state, set_hyperparameters
from smoltrain.engine.reduction import GradientDtypes
from smoltrain.engine.shards import ALLOWED_SHARD_CLASSES, SHARDS_FOLDER, ShardCheckpointEngine
from smoltrain.engine.step_method import StepMethod, StepOutcome
from smoltrain.errors import Problem, UserError


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that no update changes."""
    return tensor.detach().to("cpu", copy=True)


class EngineFacts(NamedTuple):
    """What is found out before DeepSpeed has the model: ZeRO-3 leaves its parameters empty."""

    optimizer: str  # which parameters are updated by what
    checkpoint_bytes: int


class Engine:
    """What the training loop needs of DeepSpeed, in the loop's words."""

    def __init__(
        self, deepspeed_engine: Any, steps: StepMethod, facts: EngineFacts, dtypes: GradientDtypes, world: World,
        masters: MasterWeights | None = None,
    ) -> None:  # fmt: skip
        """`masters`: where the master weights are, None where nobody asks or knows."""
        self._deepspeed = deepspeed_engine
        self._masters = masters
        self._steps = steps
        self._world = world
        self._shards = ShardCheckpointEngine(deepspeed_engine, world)
        self._norm_before_clipping = float("nan")
        self.reduction = steps.reduction
        self.optimizer_summary = facts.optimizer
        self.checkpoint_bytes = facts.checkpoint_bytes  # about what one takes on disk
        self.gradient_reduction_summary = f"{dtypes}, {steps.reduction}; fp32 master weights"
        self.stage = int(deepspeed_engine.zero_optimization_stage())
        deepspeed_engine.checkpoint_engine = self._shards
        # It copies zero_to_fp32.py into checkpoints, which fails on tied weights and unpickles anything.
        deepspeed_engine._copy_recovery_script = lambda _: None

    @property
    def module(self) -> Any:
        """The model itself, without DeepSpeed's forward."""
        return self._deepspeed.module

    @property
    def loss_scale(self) -> float:
        """The factor inside fp16 gradients; 1 in any other precision."""
        return self._steps.loss_scale

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the token losses of one micro-batch on this rank: fp32 scalar, nats."""
        return self._steps.forward(batch.to(self._deepspeed.device))

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`, for a mean over the ranks."""
        self._steps.backward(loss)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole fp32 gradient before clipping) of each parameter, between the last backward and `update`.

        Collective: every rank must run through all of them. W&B's own hooks would see one rank's local part.
        """
        for name, gradient in self._steps.whole_gradients():
            yield name, gradient / self.loss_scale

    @property
    def knows_master_weights(self) -> bool:
        """Whether `watch_update` can tell anything: only where gradients are looked at, see `build_engine`."""
        return self._masters is not None

    def watch_update(self) -> UpdateMeter | None:
        """What measures, layer by layer, how the coming update moves the fp32 master weights; before the update."""
        return UpdateMeter(self._masters, self._world) if self._masters else None

    @property
    def decides_on_device(self) -> bool:
        """Whether `start_update` asks the device for nothing, so that the host may read its outcome later."""
        return self._steps.host_wait is None

    @property
    def host_wait(self) -> str | None:
        """Why the host must wait for the device before each update; None: it does not."""
        return self._steps.host_wait

    def reduce(self) -> torch.Tensor:
        """Reduce the gradients, after the last backward; the squared L2 norm of this rank's part of them. Collective.

        An fp64 scalar on the device, for a loop that adds it up over the ranks together with other numbers, and gives
        the sum to `start_update`. Where DeepSpeed reduces, this does nothing and returns 0.
        """
        return self._steps.reduce()

    def update(self, *, lr: float, weight_decay: float) -> bool:
        """Clip and update with these values; False if a non-finite gradient made every rank skip it. Collective."""
        squared_norm = self._world.gather_numbers(self.reduce().view(1)).sum()
        outcome = self.start_update(lr=lr, weight_decay=weight_decay, squared_norm=squared_norm)
        applied = bool(outcome.applied)
        self.finish_update(applied, float(outcome.gradient_norm))
        return applied

    def start_update(
        self, *, lr: float, weight_decay: float, squared_norm: torch.Tensor, is_allowed: torch.Tensor | None = None
    ) -> StepOutcome:
        """As `update`, but nothing moves where a bool scalar, `is_allowed`, is False. Collective.

        `squared_norm`: what `reduce` returned, summed over the ranks. The gradients are gone afterwards. To be followed
        by `finish_update`, when the host has read the outcome and before anything else is asked of the engine but the
        gradients of the next step.
        """
        set_hyperparameters(self._deepspeed.optimizer.param_groups, lr=lr, weight_decay=weight_decay)
        return self._steps.update(squared_norm, is_allowed)

    def finish_update(self, applied: bool, gradient_norm: float) -> None:
        """What the host has read of the last update."""
        self._steps.finish_update(applied)
        self._norm_before_clipping = gradient_norm if applied else float("inf")

    @property
    def grad_norm_before_clipping(self) -> float:
        """Global L2 norm of the gradient of the last update; inf if it was skipped."""
        return self._norm_before_clipping

    def list_tensors(self) -> dict[str, list[torch.Tensor]]:
        """What this rank holds of weights, gradients, and masters with the optimizer's state, by part."""
        return list_engine_tensors(self._deepspeed, self._steps.gradient_sums())

    def reset_optimizer(self) -> None:
        """Zero the optimizer's state, as if training began with these weights."""
        optimizer = self._deepspeed.optimizer
        reset_optimizer_state(getattr(optimizer, "optimizer", optimizer))  # DeepSpeed wraps it, but under ZeRO-0

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """No dropout and no gradients inside."""
        self._deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._deepspeed.train()

    def weights(
        self, keep: bool, copy: Callable[[torch.Tensor], torch.Tensor] = copy_to_host
    ) -> dict[str, torch.Tensor]:
        """The model's state dict as `copy` makes it, tied tensors once; {} where not `keep`. Collective under ZeRO-3.

        Under ZeRO-3 the whole weights are there only while this runs.
        """
        parameters = list(self.module.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            if not keep:
                return {}
            tensors = dict(self.module.named_parameters())  # which gives a tied tensor once
            names = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
            for name, tensor in self.module.state_dict().items():
                if name not in names:  # a persistent buffer
                    tensors[name] = tensor
            return {name: copy(tensor) for name, tensor in tensors.items()}

    @property
    def checkpoint_classes(self) -> tuple[type, ...]:
        """The only classes that `training_state` holds beside tensors, numbers and containers."""
        return ALLOWED_SHARD_CLASSES

    def training_state(self, folder: Path) -> dict[str, Any]:
        """What this rank must write into `folder` beside `weights`, by relative file name. Collective.

        Masters and optimizer state. Makes the folders. The tensors are those in use: whoever keeps
        them over the next update copies them.
        """
        with silence_stdout():
            self._deepspeed.save_checkpoint(str(folder), tag=SHARDS_FOLDER, save_latest=False)
        return {str(Path(path).relative_to(folder)): state for path, state in self._shards.take_saved().items()}

    def load_shards(self, folder: Path, written_stage: int, weights: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `training_state`, from any number of ranks and ZeRO-1, 2 or 3 to any. Collective.

        `weights`: what `weights` gave then. Masters, optimizer state and an fp16 run's loss scale come from the disk;
        the compute weights are what this stage and precision make of the masters. The engine may have trained before.
        Errors: UserError where one of the stages is ZeRO-0, or the optimizer state is of a form that cannot be moved.
        """
        if self.stage != written_stage and 0 in (self.stage, written_stage):
            what, saw = f"{folder.name} is a checkpoint of another ZeRO stage", f"ZeRO-{self.stage}"
            want = "ZeRO-0" if written_stage == 0 else f"ZeRO-{written_stage}, or another but ZeRO-0"
            raise UserError(Problem(what, saw, want, "engine.ds_config"))
        model_states = sorted(str(path) for path in (folder / SHARDS_FOLDER).glob("*model_states.pt"))
        self._deepspeed._get_all_ckpt_names = lambda *_: model_states[:1]  # ZeRO-3 has one per rank, all alike
        self._shards.written_stage = written_stage
        self._shards.weights = weights
        with silence_stdout():
            path, _ = self._deepspeed.load_checkpoint(str(folder), tag=SHARDS_FOLDER)
            if self.stage in (1, 2):
                self._deepspeed.optimizer.update_lp_params()  # ZeRO-3 does so itself
        if self.stage == 3:
            self._shards.load_frozen_weights()
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}, though its manifest verified"


@contextlib.contextmanager
def silence_stdout() -> Iterator[None]:
    """DeepSpeed prints its settings with `print`; they stand in the run's config.yaml already."""
    with contextlib.redirect_stdout(None):
        yield
