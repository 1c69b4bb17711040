"""The roofline of a decoder on a GPU: what each part of a micro-batch computes and moves, and what the host starts.

A kernel takes as long as its operations at the peak or its bytes at the memory's speed, whichever is longer (Williams,
Waterman, Patterson 2009). Operations are those of matrix products alone. Bytes outside of products: what is not
compiled passes memory once per operation, which a test counts; what is compiled once per fused loop. Dropout is left
out.

Legend: c bytes of a weight, n tokens of a micro-batch, T of a row.
"""

from dataclasses import dataclass, replace

from smoltrain.estimate import constants
from smoltrain.estimate.constants import GPU_NARROW_SIDE, SHORTEST_KERNEL_S, SUM_BYTES, DeviceSpec
from smoltrain.estimate.memory import num_logits_chunks, num_recomputed_blocks
from smoltrain.estimate.orthogonalization import count_stacks
from smoltrain.estimate.training_setup import TrainingSetup

PROJECTIONS = "q, k, v, o"
ATTENTION = "attention"
MLP = "MLP"
LOSS = "head and loss"
ELEMENTWISE = "norms, rotary, sums"
EMBEDDING = "embedding"
RECOMPUTED = "recomputed"
WAITING = "waiting for the host"  # what of a step is no device's work
# Of what is no product in a block, forward and backward: how often the stream passes memory in norms and residual sums,
# bytes of each element of queries and keys in rotary positions, passes of the MLP's inside in SwiGLU and GELU; each
# with the operations that the host starts. Not compiled; and compiled, as read in inductor's code for a CPU (torch
# 2.13), but for rotary positions, which it passes through fp32, and with one operation more for sums over rows.
ELEMENTWISE_COSTS = {
    False: (((10, 4), (38, 16), (5, 2), (2, 1)), ((12, 4), (48, 26), (9, 3), (3, 1))),
    True: (((9, 3), (4, 2), (3, 1), (2, 1)), ((16, 4), (4, 2), (5, 1), (3, 1))),
}
# Bytes of each logit that pass memory beside the products, and operations of each chunk of them, by loss kernel: Liger
# and a compiled softmax read twice and write once.
LOSS_COSTS = {"plain": (40, 12), "recomputed": (54, 20), "fused": (32, 20), "liger": (6, 10), "compiled": (6, 6)}
ANGLE_OPERATIONS = 9  # the cosines and sines of rotary positions, once a forward pass


@dataclass(frozen=True)
class KernelWork:
    """Kernels of one kind and direction, of one block or of what is around the blocks."""

    part: str
    operations: float = 0.0  # of matrix products
    moved_bytes: float = 0.0
    share: float = 1.0  # of the best product's operations per second, that such kernels reach
    launches: float = 0.0  # operations that the host starts
    is_compiled: bool = False  # whether within a compiled region
    times: float = 1.0

    def seconds(self, flops: float, bandwidth: float, *, at_limits: bool) -> float:
        """Of a device that does so much in the best product, and reads and writes so many bytes per second."""
        moving_s = self.moved_bytes / bandwidth
        if at_limits:
            return self.times * max(self.operations / flops, moving_s)
        return self.times * max(self.operations / (flops * self.share), moving_s, self.launches * SHORTEST_KERNEL_S)


@dataclass(frozen=True)
class HostTime:
    """What the host does in a step beside a GPU."""

    launches: float  # operations that it starts
    seconds: float


def list_work(setup: TrainingSetup, device: DeviceSpec) -> list[KernelWork]:
    """Of one micro-batch, forward and backward."""
    layers = setup.shape.layers
    forward = list_block_work(setup, device, backward=False)
    again = list(forward)
    if setup.recompute == "selective":  # keeps what products and attention gave
        again = [one for one in forward if not one.operations]
    elif not setup.compiled_blocks:  # ends when all is there that backward needs: the last product's result is not
        again.remove(_list_products(setup)[-1])
    work = [replace(one, times=layers) for one in forward]
    work.extend(replace(one, part=RECOMPUTED, times=num_recomputed_blocks(setup)) for one in again)
    work.extend(replace(one, times=layers) for one in list_block_work(setup, device, backward=True))
    return [*work, *list_work_around_blocks(setup)]


def list_block_work(setup: TrainingSetup, device: DeviceSpec, *, backward: bool) -> list[KernelWork]:
    """Of one block in one direction.

    A product computes as much for the gradient of its input as for that of its weight. What several products read has
    the sum of their gradients, in a pass each where it is not compiled.
    """
    s = setup.shape
    is_compiled = setup.compiled_blocks
    tensor = setup.weight_bytes * setup.micro_batch_tokens  # bytes by width
    stream, rotary, swiglu, gelu = ELEMENTWISE_COSTS[is_compiled][backward]
    activation = swiglu if s.gated else gelu
    sums = 2 + s.gated if backward and not setup.fused_projections else 0
    moved = tensor * (s.width * (stream[0] + sums * (1 if is_compiled else 3)) + s.inner * activation[0])
    launches = stream[1] + activation[1] + (0 if is_compiled else sums)
    if s.rotary:
        moved += setup.micro_batch_tokens * (s.width + s.kv_width) * rotary[0]
        launches += rotary[1]
    work = [*_list_products(setup) * (1 + backward), *_list_attention(setup, device, backward=backward)]
    work.append(KernelWork(ELEMENTWISE, moved_bytes=moved, launches=launches))
    return [replace(one, is_compiled=is_compiled) for one in work]


def list_work_around_blocks(setup: TrainingSetup) -> list[KernelWork]:
    """Embedding, last norm, head and loss, both ways; gradients of a tied table are added up."""
    s = setup.shape
    c = setup.weight_bytes
    n = setup.micro_batch_tokens
    table = s.vocabulary * s.width
    chunks = num_logits_chunks(setup)
    logit_bytes, operations = LOSS_COSTS["compiled" if setup.loss == "fused" and setup.compiled_blocks else setup.loss]
    moved = n * s.vocabulary * logit_bytes
    if setup.loss in ("fused", "liger"):  # the table's gradient in fp32, read and written by each chunk; both scaled
        moved += table * (2 * SUM_BYTES * (chunks - 1) + SUM_BYTES + c) + 2 * c * n * s.width
    products = 4 if setup.loss == "recomputed" else 3
    return [
        KernelWork(EMBEDDING, moved_bytes=c * (4 * n * s.width + (4 if s.tied else 1) * table), launches=4 + s.tied),
        KernelWork(ELEMENTWISE, moved_bytes=5 * c * n * s.width, launches=2 + ANGLE_OPERATIONS * s.rotary),
        replace(_product(LOSS, setup, s.width, s.vocabulary), times=products, launches=0),
        KernelWork(LOSS, moved_bytes=moved, launches=operations * chunks + 6),
    ]


def estimate_host_time(setup: TrainingSetup, work: list[KernelWork], own_s: float) -> HostTime:
    """Of a step: to start all this for each micro-batch, hooks and the update; `own_s` for what is no kernel's."""
    s = setup.shape
    tensors = len(s.hidden_matrices) + 2 * s.layers + 1 + (1 if s.tied else 2) + (not s.rotary)  # biases aside
    hooks = tensors
    update = constants.COMPILED_UPDATE_OPERATIONS if setup.compiled_update else constants.FUSED_UPDATE_OPERATIONS
    if setup.stage and not setup.once_per_step:
        hooks = tensors * constants.DEEPSPEED_HOOK_OPERATIONS
        update = tensors * constants.DEEPSPEED_UPDATE_OPERATIONS
    if setup.newton_schulz_steps:
        update += constants.MUON_STACK_OPERATIONS * count_stacks(setup)
    regions = 0
    if setup.compiled_blocks:  # each entered forward and backward
        regions = 2 if setup.compiled_whole else 2 * s.layers + num_recomputed_blocks(setup)
    compiled = setup.accumulation * sum(one.times * one.launches for one in work if one.is_compiled)
    if setup.cuda_graphs:
        compiled = setup.accumulation * regions  # a launch of each
    eager = setup.accumulation * (hooks + sum(one.times * one.launches for one in work if not one.is_compiled)) + update
    seconds = own_s + eager * constants.OPERATION_S + compiled * constants.COMPILED_KERNEL_S
    seconds += setup.accumulation * regions * constants.COMPILED_REGION_S
    if setup.stage == 3:
        seconds += setup.accumulation * tensors * constants.ZERO3_MODULE_S
    return HostTime(eager + compiled, seconds)


def _list_products(setup: TrainingSetup) -> list[KernelWork]:
    """Of a block forward."""
    s = setup.shape
    gates = 1 + s.gated
    q = _product(PROJECTIONS, setup, s.width, s.width)  # and o
    down = _product(MLP, setup, s.inner, s.width)
    if setup.fused_projections:
        joint = _product(PROJECTIONS, setup, s.width, s.width + 2 * s.kv_width)
        return [joint, q, _product(MLP, setup, s.width, gates * s.inner), down]
    k = _product(PROJECTIONS, setup, s.width, s.kv_width)  # and v
    up = _product(MLP, setup, s.width, s.inner)
    return [q, q, k, k, *[up] * gates, down]


def _product(part: str, setup: TrainingSetup, inputs: int, outputs: int) -> KernelWork:
    """n x inputs by inputs x outputs."""
    n = setup.micro_batch_tokens
    moved = setup.weight_bytes * (n * inputs + inputs * outputs + n * outputs)
    share = 1 / (1 + GPU_NARROW_SIDE * (1 / n + 1 / inputs + 1 / outputs))
    return KernelWork(part, 2 * n * inputs * outputs, moved, share, launches=1)


def _list_attention(setup: TrainingSetup, device: DeviceSpec, *, backward: bool) -> list[KernelWork]:
    """Two products forward and five backward over half of the T x T pairs; of `math`, in fp32, two and four of all."""
    s, n, T = setup.shape, setup.micro_batch_tokens, setup.length
    pairs = 2 * n * T * s.width  # operations of both forward products over half of them
    rows = setup.weight_bytes * n * 2 * (s.width + s.kv_width)  # q, k, v and the output
    if setup.attention == "math":
        scores = n * s.heads * T * constants.MATH_SCORE_BYTES[backward]
        operations = pairs * (4 if backward else 2)
        share = device.fp32_flops / device.peak_flops(setup.precision)
        return [KernelWork(ATTENTION, operations, rows + scores, share, launches=constants.MATH_OPERATIONS[backward])]
    share = device.reached_attention[backward] / device.reached_matmul
    if not backward:
        return [KernelWork(ATTENTION, pairs, rows, share, launches=1)]
    # Before it a kernel of its own sums output times gradient, which the host does not start by itself.
    before = KernelWork(ATTENTION, moved_bytes=2 * setup.weight_bytes * n * s.width)
    return [before, KernelWork(ATTENTION, 2.5 * pairs, 2 * rows, share, launches=1)]
