"""DeepSpeed reduces the gradients, clips and updates. Its optimizers differ in how they skip a bad step:

DeepSpeedSteps   ZeRO-1 in bf16 (BF16_Optimizer): skips by itself
PlainSteps       ZeRO-0 (torch's optimizer, or FP16_UnfusedOptimizer): must be told, but for fp16
ZeroSteps        ZeRO-1 and ZeRO-2 (DeepSpeedZeroOptimizer): skips by itself, and is tricked into a skip
Zero3Steps       ZeRO-3 (DeepSpeedZeroOptimizer_Stage3): must be told, but for fp16
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from smoltrain.data.rows.batch import Batch
from smoltrain.engine.deepspeed_private import DeepSpeedZeroOptimizer, safe_get_full_grad
from smoltrain.engine.step_method import StepOutcome


class DeepSpeedSteps:
    """A StepMethod, as it stands for BF16_Optimizer, and the base of the others."""

    host_wait: str | None = "DeepSpeed asks it for the norm of the gradient"

    def __init__(self, deepspeed_engine: Any, reason: str) -> None:
        """`reason`: why DeepSpeed reduces, and not OncePerStep."""
        self._deepspeed = deepspeed_engine
        self._optimizer = deepspeed_engine.optimizer
        # DeepSpeed's allreduce_gradients: under ZeRO-2 and 3 at each micro-batch, else at the step's last one.
        each = deepspeed_engine.zero_optimization_partition_gradients()
        self.reduction = f"{'after each micro-batch' if each else 'once per step'}, by DeepSpeed ({reason})"

    @property
    def loss_scale(self) -> float:
        """See StepMethod."""
        return float(self._optimizer.loss_scale) if self._deepspeed.fp16_enabled() else 1.0

    def forward(self, batch: Batch) -> torch.Tensor:
        """Through DeepSpeed's own forward, whose hooks ZeRO-3 needs."""
        return self._deepspeed(batch.ids_BT, batch.labels_BT, **batch.document_arguments())

    def backward(self, loss: torch.Tensor) -> None:
        """See StepMethod."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # DeepSpeed's word for "next micro-batch"; nothing moves before the boundary

    def whole_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See StepMethod."""
        for name, parameter in self._deepspeed.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                yield name, gradient.detach().float()

    def gradient_sums(self) -> list[torch.Tensor]:
        """None: DeepSpeed has its own."""
        return []

    def reduce(self) -> torch.Tensor:
        """Nothing to do: DeepSpeed has reduced in `backward`, and takes the norm in `update`."""
        return torch.zeros((), dtype=torch.float64, device=self._deepspeed.device)

    def update(self, squared_norm: torch.Tensor, is_allowed: torch.Tensor | None = None) -> StepOutcome:  # noqa: ARG002
        """See StepMethod."""
        if is_allowed is not None and not is_allowed:
            squares = [float(gradient.double().square().sum()) for _, gradient in self.whole_gradients()]
            norm = math.sqrt(sum(squares)) / self.loss_scale
            self._discard_gradients()
            return StepOutcome.on_host(False, norm)
        return self.take_step()

    def take_step(self) -> StepOutcome:
        """Update, unless the gradient is not finite."""
        self._deepspeed.step()
        return StepOutcome.on_host(self._deepspeed.was_step_applied(), float(self._deepspeed.get_global_grad_norm()))

    def finish_update(self, applied: bool) -> None:
        """Nothing to do: DeepSpeed counts for itself."""

    def _discard_gradients(self) -> None:
        """Forget what was accumulated, as if it had not been: no weight moves, and no loss scale."""
        self._optimizer.zero_grad()
        self._deepspeed.micro_steps += 1  # by which DeepSpeed knows the boundary of the next step


class PlainSteps(DeepSpeedSteps):
    """ZeRO-0: whole gradients on every rank, reduced at the step's last micro-batch."""

    def backward(self, loss: torch.Tensor) -> None:
        """Here DeepSpeed 0.19.8 divides by the loss scale of fp16, and does not multiply by it: `scale_if_loss`."""
        super().backward(loss * self.loss_scale)

    def take_step(self) -> StepOutcome:
        """The norm comes from the gradients themselves: here DeepSpeed has none to give unless it clips."""
        # In fp16 a norm that is multiplied by the loss scale is soon above 65504.
        gradients = [p.grad.float() for p in self._deepspeed.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale
        # In fp16 DeepSpeed skips by itself, and must, as it lowers the loss scale then.
        if not self._deepspeed.fp16_enabled() and not math.isfinite(norm):
            self._discard_gradients()
            return StepOutcome.on_host(False, norm)
        self._deepspeed.step()
        return StepOutcome.on_host(self._deepspeed.was_step_applied(), norm)


class ZeroSteps(DeepSpeedSteps):
    """ZeRO-1 and ZeRO-2: each rank holds the reduced gradient of its partition."""

    def __init__(self, deepspeed_engine: Any, reason: str) -> None:
        """See DeepSpeedSteps."""
        super().__init__(deepspeed_engine, reason)
        optimizer = self._optimizer
        self._discards = False
        # In fp32 DeepSpeed would not ask `check_overflow`, on which `_discard_gradients` depends; and in bf16 a config
        # file could switch the question off, so that a gradient that is not finite were applied.
        optimizer.check_grad_overflow = True
        # It looks at each tensor, several operations and a collective that the host waits for. In bf16 and fp32 the
        # norm, which DeepSpeed's step takes next and looks at too, tells the same.
        norm_tells = not deepspeed_engine.fp16_enabled() and optimizer.compute_grad_norm and not optimizer.cpu_offload
        look_at_each_tensor = optimizer.check_overflow

        def check_overflow(**options: Any) -> None:
            if self._discards:
                optimizer.overflow = True
            elif not norm_tells:
                look_at_each_tensor(**options)

        optimizer.check_overflow = check_overflow

    def _discard_gradients(self) -> None:
        """DeepSpeed's step of a gradient that overflows clears all that it has accumulated, and updates nothing."""
        self._discards = True
        self._optimizer._update_scale = lambda *_: None  # the loss scale of fp16 stays
        try:
            self._deepspeed.step()
        finally:
            self._discards = False
            del self._optimizer._update_scale


class Zero3Steps(DeepSpeedSteps):
    """ZeRO-3: weights are partitioned too."""

    def take_step(self) -> StepOutcome:
        """DeepSpeed asks for overflow in fp16 alone, so the question is asked here for the other precisions."""
        if not self._deepspeed.fp16_enabled() and self._optimizer.has_overflow():  # the same on every rank
            self._discard_gradients()
            return StepOutcome.on_host(False, math.inf)
        return super().take_step()

    def _discard_gradients(self) -> None:
        """What DeepSpeed does of its own when a gradient overflows."""
        self._optimizer._overflow_clean_up(self.loss_scale)
        self._deepspeed.micro_steps += 1


def choose_deepspeed_steps(deepspeed_engine: Any, reason: str) -> DeepSpeedSteps:
    """The class for the optimizer that DeepSpeed has chosen."""
    stage = int(deepspeed_engine.zero_optimization_stage())
    if stage == 0:
        return PlainSteps(deepspeed_engine, reason)
    if stage == 3:
        return Zero3Steps(deepspeed_engine, reason)
    if isinstance(deepspeed_engine.optimizer, DeepSpeedZeroOptimizer):
        return ZeroSteps(deepspeed_engine, reason)
    return DeepSpeedSteps(deepspeed_engine, reason)
