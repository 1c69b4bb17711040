"""ZeRO-1 and ZeRO-2 whose gradients travel once a step, and whose update is one pass over memory.

DeepSpeed's ZeRO-2 reduces after every micro-batch, through copies in the weights' precision and in fp32; at the end it
looks for overflow, takes the norm, clips, updates and casts, each in a pass of its own over all gradients. With a CPU's
memory these passes cost as much as a small model. Here each gradient is added up in fp32 as soon as backward has made
it, while it is in the cache; at the step's end the sums travel once, and one compiled loop clips, updates and casts.
DeepSpeed stays what lays out the partitions, holds masters and moments, and gives them their form on disk.

The price is an fp32 gradient of the whole model on every rank, of which ZeRO-2 alone would keep a part; a lone
micro-batch on a lone rank has nothing to add up, and its gradients stay as they are. The arithmetic is that of
Rajbhandari et al. (2020) either way: tests/engine/test_once_per_step.py compares the two.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from smoltrain.distributed.world import World
from smoltrain.engine.shared_tensor import SharedTensor
from smoltrain.kernels.compile import CompilableFunction
from smoltrain.kernels.fp32_sums import accumulate_fp32

CHUNK = 2**20  # elements whose squares are added up in fp32, before fp64 takes over


def gradient_sum_dtype(weights: torch.dtype, accumulation: int, world_size: int) -> torch.dtype:
    """fp32, but for a lone micro-batch on a lone rank, whose gradients have the dtype of the weights and stay so."""
    return weights if accumulation == world_size == 1 else torch.float32


class OncePerStep:
    """Takes over from DeepSpeed's optimizer (of stage 1 or 2) all that happens between backward and the next forward.

    Per group of parameters there are two flat tensors, of weights and of gradient sums, one part of each per rank.
    """

    def __init__(self, optimizer: Any, world: World, *, accumulation: int, clip: float, compiles: bool) -> None:
        """`optimizer` is a DeepSpeedZeroOptimizer; `clip` the largest norm of a gradient, 0 for any. Collective."""
        self._ds, self._world, self._clip, self._compiles = optimizer, world, clip, compiles
        self._weights: list[SharedTensor] = []
        self._sums: list[SharedTensor] = []
        self._places: dict[torch.Tensor, torch.Tensor] = {}  # parameter -> its place in the sums
        self._with_gradient: set[torch.Tensor] = set()  # parameters that a backward of this step reached
        self._own_gradients: list[torch.Tensor] | None = None  # this rank's parts, once the sums have travelled
        for handle in optimizer._grad_acc_hooks:
            handle.remove()
        for i, theirs in enumerate(optimizer.bit16_groups_flat):
            self._adopt_weights(i, theirs)
            dtype = gradient_sum_dtype(theirs.dtype, accumulation, world.size)
            self._sums.append(sums := SharedTensor(world, theirs.numel(), dtype))
            for parameter, place in self._parameter_views(i, sums.own):
                self._places[parameter] = place
                parameter.register_post_accumulate_grad_hook(self._accumulate_gradient)

    @property
    def how(self) -> str:
        """By which way gradients and weights travel."""
        return self._sums[0].how

    def _adopt_weights(self, i: int, theirs: torch.Tensor) -> None:
        """Let DeepSpeed keep the weights of group i in our flat tensor."""
        self._weights.append(flat := SharedTensor(self._world, theirs.numel(), theirs.dtype))
        flat.own.copy_(theirs)
        self._ds.bit16_groups_flat[i] = flat.own
        self._ds.parallel_partitioned_bit16_groups[i] = list(flat.own.chunk(self._world.size))
        self._ds._update_model_bit16_weights(i)
        for parameter in self._ds.bit16_groups[i]:  # links to where the weights were would keep that memory
            if link := getattr(parameter, "_hp_mapping", None):
                place = link.lp_fragment_address
                link.lp_fragment = parameter.detach().view(-1)[place.start : place.start + place.numel]

    def _parameter_views(self, i: int, flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(parameter, its place in a flat tensor) of group i."""
        weights = self._weights[i].own
        for parameter in self._ds.bit16_groups[i]:
            first = (parameter.data_ptr() - weights.data_ptr()) // weights.element_size()
            yield parameter, flat[first : first + parameter.numel()].view(parameter.shape)

    def _accumulate_gradient(self, parameter: torch.Tensor) -> None:
        """What backward calls when the gradient of a parameter is whole."""
        gradient, place = parameter.grad, self._places[parameter]
        assert gradient is not None
        if parameter in self._with_gradient:
            accumulate_fp32(place, gradient)
        else:
            place.copy_(gradient)
            self._with_gradient.add(parameter)
        parameter.grad = None

    def drop(self) -> None:
        """Forget the gradients of this step."""
        self._with_gradient.clear()
        self._own_gradients = None

    def reduce_scatter_gradients(self) -> list[torch.Tensor]:
        """This rank's part of each group's gradient, summed over the ranks. They travel once. Collective."""
        if self._own_gradients is None:
            for parameter, place in self._places.items():
                if parameter not in self._with_gradient:
                    place.zero_()
            self._own_gradients = [sums.reduce_scatter() for sums in self._sums]
        return self._own_gradients

    def gradients(self) -> dict[torch.Tensor, torch.Tensor]:
        """The whole gradient of each parameter, summed over the ranks. Collective."""
        self.reduce_scatter_gradients()
        for sums in self._sums:
            sums.all_gather()
        self._world.barrier()  # a rank that goes on to its next backward would write where a slower one still reads
        return self._places

    def reduce(self) -> float:
        """Reduce-scatter the gradients; the squared L2 norm of this rank's part. Collective."""
        squared = _sum_of_squares.compiled if self._compiles else _sum_of_squares_eager
        return float(torch.stack([squared(part).double() for part in self.reduce_scatter_gradients()]).sum())

    @torch.no_grad()
    def update(self, norm: float) -> None:
        """One AdamW step, with lr and weight decay as the optimizer's groups have them. Collective."""
        scale = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
        for i, (gradient, weights) in enumerate(zip(self.reduce_scatter_gradients(), self._weights, strict=True)):
            mine = weights.own[weights.part]
            if self._compiles:
                self._update_in_one_pass(i, mine, gradient, scale)
            else:
                master = self._ds.single_partition_of_fp32_groups[i]
                wide = gradient.float()
                master.grad = wide.mul_(scale) if scale < 1 else wide
                self._ds._optimizer_step(i)
                master.grad = None
                mine.copy_(master)
            weights.all_gather()
        self._ds._lazy_init_hp_params_optimizer_state()
        self.drop()

    def _update_in_one_pass(self, i: int, weights: torch.Tensor, gradient: torch.Tensor, scale: float) -> None:
        group, master = self._ds.optimizer.param_groups[i], self._ds.single_partition_of_fp32_groups[i]
        state = self._adamw_state(master)
        state["step"] += 1
        (beta1, beta2), lr, step = group["betas"], group["lr"], float(state["step"])
        numbers = (
            scale, 1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
            math.sqrt(1 - beta2**step), group["eps"],
        )  # fmt: skip
        # A tensor, as each new Python number would be compiled anew.
        scalars = torch.tensor(numbers, dtype=torch.float32, device=master.device)
        _adamw_step.compiled(master, state["exp_avg"], state["exp_avg_sq"], weights, gradient, scalars)

    def _adamw_state(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """Step count and moments of a part, under the names of torch's AdamW."""
        state = self._ds.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state


@CompilableFunction
def _sum_of_squares(part: torch.Tensor) -> torch.Tensor:
    """In fp32, in which a sum of 10^9 squares was off by 6e-6 of itself."""
    return part.float().square().sum()


def _sum_of_squares_eager(part: torch.Tensor) -> torch.Tensor:
    """The same, in fp64 over chunks, without a whole copy in fp32."""
    norms = [torch.linalg.vector_norm(chunk.float()) for chunk in part.split(CHUNK)]
    return torch.stack(norms).double().square().sum()


@CompilableFunction
def _adamw_step(
    master: torch.Tensor, first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor,
    scalars: torch.Tensor,
) -> None:  # fmt: skip
    """AdamW (Loshchilov & Hutter 2019), in place, operation by operation as torch's own; weights: the master's cast."""
    scale, keep, rest1, beta2, rest2, step_size, root2, eps = scalars.unbind()
    g = gradient.float() * scale
    m = first + (g - first) * rest1
    v = second * beta2 + rest2 * g * g
    p = master * keep - step_size * m / (v.sqrt() / root2 + eps)
    first.copy_(m)
    second.copy_(v)
    master.copy_(p)
    weights.copy_(p)
