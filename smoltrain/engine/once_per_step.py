"""ZeRO-1 and ZeRO-2 whose gradients are reduced once per step, and whose update is one pass over memory.

DeepSpeed's ZeRO-2 reduces after every micro-batch, through copies in the weights' precision and in fp32; at
the end it looks for overflow, takes the norm, clips, updates and casts, each in a pass of its own over all
gradients. With a CPU's memory these passes cost as much as a small model. Here each gradient is accumulated
in fp32 as soon as backward has made it, while it is in the cache; at the step's end the sums are
reduce-scattered, and one compiled loop clips, updates and casts. DeepSpeed stays what lays out the
partitions, holds masters and optimizer state, and writes them to disk.

The price is an fp32 gradient of the whole model on every rank, of which ZeRO-2 alone would keep a part; a
lone micro-batch on a lone rank has nothing to add up, and its gradients stay as they are. The arithmetic is
that of Rajbhandari et al. (2020) either way: tests/engine/test_once_per_step.py compares the two.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from smoltrain.data.rows.batch import Batch
from smoltrain.distributed.world import World
from smoltrain.engine.optimizer import clipping_factor
from smoltrain.engine.optimizer_kind import OptimizerKind
from smoltrain.engine.reduction import gradient_sum_dtype
from smoltrain.engine.shared_tensor import SharedTensor
from smoltrain.engine.step_method import StepOutcome
from smoltrain.kernels.compile import CompilableFunction
from smoltrain.kernels.fp32_sums import accumulate_fp32

CHUNK = 2**20  # elements whose squares are added up in fp32, before fp64 takes over


class OncePerStep:
    """A StepMethod: accumulates in fp32, reduce-scatters once per step, clips, updates, all-gathers the weights.

    Per parameter group there are two flat tensors, of weights and of gradient sums, one part of each per rank.
    """

    loss_scale = 1.0

    def __init__(
        self, deepspeed_engine: Any, kind: OptimizerKind, world: World, reason: str, *, accumulation: int, clip: float,
        compiles: bool,
    ) -> None:  # fmt: skip
        """Takes gradients and update over from a DeepSpeedZeroOptimizer. Collective.

        `reason`: why DeepSpeed does not reduce, for the console. `clip`: the largest norm of a gradient, 0 for any.
        `compiles`: whether torch.compile may be used.
        """
        self._deepspeed = deepspeed_engine
        self._zero_optimizer = deepspeed_engine.optimizer
        self._kind = kind
        self._world = world
        self._reason = reason
        self._clip = clip
        self._compiles = compiles
        self._in_one_pass = compiles and kind.has_one_pass_update
        self._masks = self._in_one_pass or kind.masks_own_step(self._zero_optimizer.optimizer)
        self.host_wait: str | None = None
        if not self._masks:
            self.host_wait = f"the step of {type(kind).__name__} that runs here cannot be masked"
        self._weights: list[SharedTensor] = []  # by parameter group
        self._sums: list[SharedTensor] = []
        self._sum_of: dict[torch.Tensor, torch.Tensor] = {}  # parameter -> its view of the sums
        self._with_gradient: set[torch.Tensor] = set()  # parameters that a backward of this step reached
        self._own_gradients: list[torch.Tensor] | None = None  # this rank's parts, once they are reduced
        for hook in self._zero_optimizer._grad_acc_hooks:  # a hook that stayed would reduce a second time
            hook.remove()
        for group, theirs in enumerate(self._zero_optimizer.bit16_groups_flat):
            self._adopt_weights(group, theirs)
            dtype = gradient_sum_dtype(theirs.dtype, accumulation, world.size)
            sums = SharedTensor(world, theirs.numel(), dtype)
            self._sums.append(sums)
            for parameter, view in self._parameter_views(group, sums.own):
                self._sum_of[parameter] = view
                parameter.register_post_accumulate_grad_hook(self._accumulate_gradient)

    @property
    def reduction(self) -> str:
        """See StepMethod."""
        return f"once per step, {self._sums[0].how} ({self._reason})"

    def _adopt_weights(self, group: int, theirs: torch.Tensor) -> None:
        """Let DeepSpeed keep the weights of a parameter group in our flat tensor."""
        flat = SharedTensor(self._world, theirs.numel(), theirs.dtype)
        self._weights.append(flat)
        flat.own.copy_(theirs)
        optimizer = self._zero_optimizer
        optimizer.bit16_groups_flat[group] = flat.own
        optimizer.parallel_partitioned_bit16_groups[group] = list(flat.own.chunk(self._world.size))
        optimizer._update_model_bit16_weights(group)
        for parameter in optimizer.bit16_groups[group]:  # links to where the weights were would keep that memory
            link = getattr(parameter, "_hp_mapping", None)
            if link is not None:
                address = link.lp_fragment_address
                link.lp_fragment = parameter.detach().view(-1)[address.start : address.start + address.numel]

    def _parameter_views(self, group: int, flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(parameter, its view of a flat tensor) of a parameter group."""
        weights = self._weights[group].own
        for parameter in self._zero_optimizer.bit16_groups[group]:
            first = (parameter.data_ptr() - weights.data_ptr()) // weights.element_size()
            yield parameter, flat[first : first + parameter.numel()].view(parameter.shape)

    def _accumulate_gradient(self, parameter: torch.Tensor) -> None:
        """What backward calls when the gradient of a parameter is whole."""
        gradient = parameter.grad
        assert gradient is not None
        if parameter in self._with_gradient:
            accumulate_fp32(self._sum_of[parameter], gradient)
        else:  # the step's first: no pass over memory to zero the sums before
            self._sum_of[parameter].copy_(gradient)
            self._with_gradient.add(parameter)
        parameter.grad = None

    def forward(self, batch: Batch) -> torch.Tensor:
        """See StepMethod. The model alone: what DeepSpeed's own forward prepares is for its own hooks."""
        return self._deepspeed.module(batch.ids_BT, batch.labels_BT, **batch.document_arguments())

    def backward(self, loss: torch.Tensor) -> None:
        """See StepMethod."""
        (loss / self._world.size).backward()

    def whole_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See StepMethod."""
        self._reduce_scatter()
        for sums in self._sums:
            sums.all_gather()
        self._world.barrier()  # a rank that began its next backward would write where a slower one still reads
        for name, parameter in self._deepspeed.module.named_parameters():
            if parameter in self._sum_of:  # a frozen one has no gradient
                yield name, self._sum_of[parameter].float()

    def gradient_sums(self) -> list[torch.Tensor]:
        """See StepMethod."""
        return [sums.own for sums in self._sums]

    def _reduce_scatter(self) -> list[torch.Tensor]:
        """This rank's part of each parameter group's gradient, summed over the ranks; reduced when first asked for."""
        if self._own_gradients is None:
            for parameter, view in self._sum_of.items():
                if parameter not in self._with_gradient:
                    view.zero_()  # it holds the sum of a step before
            self._own_gradients = [sums.reduce_scatter() for sums in self._sums]
        return self._own_gradients

    def reduce(self) -> torch.Tensor:
        """See StepMethod."""
        squared_norm = _sum_of_squares.compiled if self._compiles else _sum_of_squares_eager
        parts = [squared_norm(part).double() for part in self._reduce_scatter()]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def update(self, squared_norm: torch.Tensor, is_allowed: torch.Tensor | None = None) -> StepOutcome:
        """See StepMethod."""
        norm = squared_norm.sqrt()
        moves = norm < math.inf  # neither inf nor nan
        if is_allowed is not None:
            moves = moves & is_allowed
        outcome = StepOutcome(moves, norm)
        if not self._masks and not moves:
            self._discard_gradients()
            return outcome
        verdict = torch.stack((clipping_factor(norm, self._clip), moves.double())).float()
        optimizer = self._zero_optimizer.optimizer
        if self._masks and not self._in_one_pass:
            optimizer.found_inf = 1 - verdict[1]  # as torch.amp.GradScaler tells it
        for group, gradient in enumerate(self._reduce_scatter()):
            flat = self._weights[group]
            weights = flat.own[flat.part]
            if self._in_one_pass:
                self._update_in_one_pass(group, weights, gradient, verdict)
            else:
                self._update_in_passes(group, weights, gradient, verdict[0])
            flat.all_gather()
        optimizer.found_inf = None
        self._zero_optimizer._lazy_init_hp_params_optimizer_state()
        self._discard_gradients()
        return outcome

    def finish_update(self, applied: bool) -> None:
        """See StepMethod."""
        if self._in_one_pass:
            self._kind.finish_one_pass(self._zero_optimizer.optimizer, applied)
        if applied:
            self._deepspeed.global_steps += 1  # which DeepSpeed writes into its files
            self._deepspeed.global_samples += self._deepspeed.train_batch_size()

    def _update_in_one_pass(
        self, group: int, weights: torch.Tensor, gradient: torch.Tensor, verdict: torch.Tensor
    ) -> None:
        master = self._zero_optimizer.single_partition_of_fp32_groups[group]
        optimizer = self._zero_optimizer.optimizer
        self._kind.update_in_one_pass(optimizer, optimizer.param_groups[group], master, weights, gradient, verdict)

    def _update_in_passes(self, group: int, weights: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor) -> None:
        """Scale the gradient, torch's own step, and the cast: each a pass over memory."""
        master = self._zero_optimizer.single_partition_of_fp32_groups[group]
        wide = gradient.float()
        is_clipped = self._clip > 0 and (self._masks or bool(scale < 1))  # the host does not ask a GPU
        master.grad = wide.mul_(scale) if is_clipped else wide
        self._zero_optimizer._optimizer_step(group)
        master.grad = None
        weights.copy_(master)

    def _discard_gradients(self) -> None:
        """Forget what was accumulated, as if it had not been: no weight moves, and no loss scale."""
        self._with_gradient.clear()
        self._own_gradients = None


@partial(CompilableFunction, any_length=True)
def _sum_of_squares(part: torch.Tensor) -> torch.Tensor:
    """In fp32, in which a sum of 10^9 squares was off by 6e-6 of itself."""
    return part.float().square().sum()


def _sum_of_squares_eager(part: torch.Tensor) -> torch.Tensor:
    """The same; on a CPU in fp64 over chunks, without a whole copy in fp32. A GPU adds up as a tree, in one kernel."""
    if part.device.type != "cpu":
        return torch.linalg.vector_norm(part, dtype=torch.float32).double().square()
    norms = [torch.linalg.vector_norm(chunk.float()) for chunk in part.split(CHUNK)]
    return torch.stack(norms).double().square().sum()
