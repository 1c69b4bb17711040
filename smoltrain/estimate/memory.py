"""Memory of one rank at its fullest, by part.

Training has four moments that can be the fullest one: when all activations and the loss's own tensors are there, when
backward begins, when it ends with all gradients, and the update. Each is a sum of named parts; the largest is the
estimate.

Legend, as factors of bytes: N parameters of the model, W ranks, P = N / W, c bytes of a weight (2 or 4), b elements of
DeepSpeed's bucket, D width, H heads, I width inside the MLP, V vocabulary, T tokens of a row, n of a micro-batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from smoltrain.engine.optimizer import FP32_BYTES
from smoltrain.estimate import constants
from smoltrain.estimate.constants import SUM_BYTES
from smoltrain.estimate.orthogonalization import orthogonalization_temporary_bytes
from smoltrain.estimate.training_setup import TrainingSetup
from smoltrain.kernels.cpu_attention import MAX_KEPT_LENGTH, QUERIES_PER_BLOCK
from smoltrain.kernels.loss import CHUNK_BYTES, LARGE_CHUNK_BYTES, LIGER_CHUNKS

PART_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "masters, optimizer state",
    "activations": "activations",
    "logits": "logits, head's gradients",
    "reduction": "reduction buffers",
    "update": "the update's temporaries",
    "checkpoint": "a checkpoint in the making",
    "rest": "the rest",
}
Parts = Mapping[str, float]  # bytes by part


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, at the fullest moment."""

    parts: Parts

    @property
    def total(self) -> float:
        """Bytes that the rank's device must have; on a CPU its largest resident set."""
        return sum(self.parts.values())

    def __getitem__(self, part: str) -> float:
        return self.parts.get(part, 0.0)


def estimate_memory(setup: TrainingSetup, base_bytes: float | None = None) -> MemoryEstimate:
    """The estimate; `base_bytes` takes the place of what was measured of Python and its libraries, or of CUDA."""
    states, at_backward_end, at_update = _zero_state_bytes(setup)
    activations, differentiated = activation_bytes(setup)
    kept_by_loss, while_loss_works = loss_bytes(setup)
    table = setup.weight_bytes * setup.shape.vocabulary * setup.shape.width
    # A tied table has two gradients on a GPU, of the head and of the look-up, and their sum.
    tables = 3 if setup.shape.tied and setup.device == "cuda" else 1
    moments: list[Parts] = [
        {"activations": activations, "logits": max(while_loss_works, kept_by_loss)},
        {"activations": activations + differentiated, "logits": kept_by_loss},
        {**at_backward_end, "logits": table * tables},
        {"update": at_update},
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    on_top = sum(fullest.values())
    parts = {part: states.get(part, 0.0) + fullest.get(part, 0.0) for part in PART_LABELS}
    if setup.device == "cpu":
        if setup.saves_midway:
            parts["checkpoint"] = checkpoint_copy_bytes(setup)
            on_top += parts["checkpoint"]
        if base_bytes is None:
            base_bytes = constants.CPU_BASE_BYTES + setup.compiled_update * constants.CPU_COMPILER_BYTES
        parts["rest"] = base_bytes + _cpu_fragmentation_bytes(setup, on_top)
    else:
        if base_bytes is None:
            base_bytes = constants.CUDA_BASE_BYTES
        parts["rest"] = base_bytes + constants.CUDA_FRAGMENTATION * (sum(states.values()) + on_top)
    return MemoryEstimate(parts)


def checkpoint_copy_bytes(setup: TrainingSetup) -> float:
    """Of host memory on rank 0 while a checkpoint is written: its part of masters and state, the weights."""
    N = setup.shape.parameters
    states = FP32_BYTES * N + setup.optimizer_state_bytes
    return states / (setup.world if setup.stage else 1) + setup.weight_bytes * N


def _cpu_fragmentation_bytes(setup: TrainingSetup, on_top: float) -> float:
    """Bytes that malloc keeps on a CPU and nobody uses, at the moment with `on_top` of what is always there.

    A model begins in fp32, and where it left room activations lie later; not so the casts between its weights.
    """
    N, c = setup.shape.parameters, setup.weight_bytes
    if setup.once_per_step:
        casts = c * N if c < 4 else 0.0
        return max(4 * N - on_top, casts)
    uses_bucket = setup.stage >= 2 or (setup.stage == 1 and setup.precision != "bf16")
    bucket = constants.CPU_BUCKET_FRAGMENTATION * min(N, setup.bucket) if uses_bucket else 0
    gathered = constants.CPU_GATHERED_FRAGMENTATION * N if setup.stage == 3 and setup.world > 1 else 0
    return max(constants.CPU_STARTING_BYTES * N - on_top, constants.CPU_FRAGMENTATION * on_top) + bucket + gathered


def _zero_state_bytes(setup: TrainingSetup) -> tuple[Parts, Parts, float]:
    """What is always there; what comes on top when backward ends; temporaries of the update.

    ZeRO (Rajbhandari et al. 2020, section 5) parts masters and the optimizer's state among the ranks from stage 1 on,
    gradients from 2, weights from 3. What DeepSpeed 0.19.8 really holds differs, and was counted by torch's profiler,
    allocation by allocation, at stages 0 to 3 on one rank and two.
    """
    N, c, W = setup.shape.parameters, setup.weight_bytes, setup.world
    P = N / W
    b = min(N, setup.bucket)
    optimizer = FP32_BYTES * P + setup.optimizer_state_bytes / W
    elementwise = N - setup.shape.hidden_parameters if setup.newton_schulz_steps else N
    # torch's fused kernels have none
    eager_update = 0.0 if setup.device == "cuda" else setup.optimizer.temporary_bytes * elementwise / W
    if setup.once_per_step and setup.gradient_sum_bytes < SUM_BYTES:
        eager_update += SUM_BYTES * elementwise / W  # the gradient in fp32, which a compiled update widens as it goes
    orthogonalization = orthogonalization_temporary_bytes(setup)  # before the others are updated, or after it
    eager_update = max(eager_update, orthogonalization)
    if setup.stage == 0:  # fp32 alone, where the weights are the masters
        states = {"weights": c * N, "gradients": SUM_BYTES * N, "optimizer": setup.optimizer_state_bytes}
        return states, {"reduction": SUM_BYTES * b}, orthogonalization
    if setup.once_per_step:  # stage 1 or 2, whole sums on every rank
        states = {"weights": c * N, "gradients": setup.gradient_sum_bytes * N, "optimizer": optimizer}
        if (
            setup.device == "cpu"
        ):  # in shared memory, where a rank reads its part of the others' sums, and their weights
            states["reduction"] = (W - 1) * (SUM_BYTES + c) * P
        return states, {}, orthogonalization if setup.compiled_update else eager_update
    if setup.stage == 1 and setup.precision == "bf16":  # gradients in bf16 beside their sums
        states = {"weights": c * N, "gradients": (SUM_BYTES + c) * N, "optimizer": optimizer}
        return states, {"reduction": SUM_BYTES * b}, eager_update
    bucket = setup.bucket if setup.device == "cuda" else b  # on a CPU only what was touched counts
    casts = (SUM_BYTES + 2) * b  # to fp32
    if setup.stage < 3:
        states = {"weights": c * N, "gradients": SUM_BYTES * P, "optimizer": optimizer, "reduction": c * bucket}
        return states, {"reduction": casts}, eager_update
    states = {"weights": c * P, "gradients": SUM_BYTES * P, "optimizer": optimizer, "reduction": SUM_BYTES * bucket}
    gathered = c * N if W > 1 else 0.0
    cast_for_update = SUM_BYTES * P  # gradients
    return states, {"reduction": casts, "weights": gathered}, eager_update + cast_for_update


def activation_bytes(setup: TrainingSetup) -> tuple[float, float]:
    """(kept from forward to backward, on top of that while a block is differentiated), bytes.

    Full recomputation keeps the input of each block (Chen et al. 2016), every n-th that of each n-th block and all of
    the others, selective what matmuls and attention give (Korthikanti et al. 2022, section 5, keep more).
    """
    s, c, n = setup.shape, setup.weight_bytes, setup.micro_batch_tokens
    block = n * block_activation_bytes(setup)
    recomputed = num_recomputed_blocks(setup)
    recomputed_block = c * n * s.width
    if setup.recompute == "selective":
        matmuls = 3 * s.width + 2 * s.kv_width + (3 if s.gated else 2) * s.inner
        recomputed_block += c * n * matmuls + 4 * n * s.heads
    last_norm = n * _norm_activation_bytes(setup)
    kept = (s.layers - recomputed) * block + recomputed * recomputed_block + last_norm
    mlp_gradients = c * n * (3 * s.inner + 3 * s.width)
    return kept, mlp_gradients + (block if recomputed else 0)


def num_recomputed_blocks(setup: TrainingSetup) -> int:
    """Blocks that run once more in the backward pass; selective parts of all, or none where the compiler chooses."""
    layers = setup.shape.layers
    if isinstance(setup.recompute, int):
        return -(-layers // setup.recompute)  # rounded up
    if setup.recompute == "none" or (setup.recompute == "selective" and setup.compiled_blocks):
        return 0
    return layers


def block_activation_bytes(setup: TrainingSetup) -> float:
    """Bytes a token that autograd keeps of one block, as saved_tensors_hooks count them in the tests.

    Each matmul keeps its input (Korthikanti et al. 2022, section 4): the norms' outputs cD twice, the context cD, the
    MLP's product cI; attention keeps q, k and v, c(D + 2 D_kv); the activation its inputs, cI each; a norm its own
    input, cD. A compiled block keeps less: the gate's activation and the insides of the norms are computed anew.
    """
    s, c = setup.shape, setup.weight_bytes
    kept = 2 * _norm_activation_bytes(setup) + c * (2 * s.width + 2 * s.kv_width)  # the norms, q, k, v, the context
    if setup.device == "cpu" and s.rotary and setup.attention == "sdpa":
        kept += c * s.width  # the rotary positions' output lies in the order of the heads and is copied
    kept += c * s.inner * (2 + s.gated + (s.gated and not setup.compiled_blocks))
    if s.dropout:
        kept += 2 * s.width  # a byte for what is dropped
    return kept + attention_activation_bytes(setup)


def _norm_activation_bytes(setup: TrainingSetup) -> float:
    """Bytes a token that a norm keeps, its output included, which the matmul behind it keeps."""
    D, c = setup.shape.width, setup.weight_bytes
    if not setup.shape.rmsnorm:
        return 2 * c * D + 2 * c
    if setup.device == "cpu" and not setup.compiled_blocks:  # no single operation there: 8D in fp32
        return (8 + c) * D + 4
    return 2 * c * D + 4


def attention_activation_bytes(setup: TrainingSetup) -> float:
    """Bytes a token that the attention kernel keeps beside q, k, v and the context."""
    H, c, T = setup.shape.heads, setup.weight_bytes, setup.length
    if setup.attention == "math":  # all probabilities in the dtype, and what a dropout on them drops
        return 2 * c * H * T
    if setup.attention != "blocked":  # flash kernels: the log-sum-exp of each row in fp32
        return 4.0 * H
    if keeps_probabilities(setup):  # those of each block of queries with the keys up to its end
        return c * H * (T + min(T, QUERIES_PER_BLOCK)) / 2
    return 0.0


def keeps_probabilities(setup: TrainingSetup) -> bool:
    """Whether the attention kernel keeps its probabilities; else it computes them once more in the backward pass."""
    return setup.attention == "math" or (setup.attention == "blocked" and setup.length <= MAX_KEPT_LENGTH)


def loss_bytes(setup: TrainingSetup) -> tuple[float, float]:
    """(kept by the loss for its backward, while it works), bytes: logits and the gradients that take their place.

    plain: the logits cnV, in fp32, their log-softmax, and the gradients of both: 12nV at the fullest, 4nV kept.
    fused, liger: a chunk of logits, the gradient of the hidden states cnD and of the table, 4VD in fp32 where chunks
    are added up; scaled by the incoming gradient they are copied. recomputed: a chunk as plain, nothing kept but cnD.
    """
    c, n, V = setup.weight_bytes, setup.micro_batch_tokens, setup.shape.vocabulary
    if setup.loss == "plain":
        return 4 * n * V, 12.0 * n * V
    logits = c * n * V
    table = V * setup.shape.width
    hidden = c * n * setup.shape.width
    chunk = min(logits, _chunk_budget_bytes(setup))
    if setup.loss == "recomputed":
        return 0.0, chunk * (12 + c) / c + c * table
    kept = hidden + (4 if chunk < logits else c) * table
    return kept, max(kept + chunk, kept + hidden + c * table)


def num_logits_chunks(setup: TrainingSetup) -> int:
    """Pieces in which a micro-batch's logits exist."""
    logits = setup.weight_bytes * setup.micro_batch_tokens * setup.shape.vocabulary
    return 1 if setup.loss == "plain" else math.ceil(logits / _chunk_budget_bytes(setup))


def _chunk_budget_bytes(setup: TrainingSetup) -> float:
    """Of logits at a time. On a GPU as with 64 GiB of memory; with more it is a 256th of that."""
    if setup.loss == "liger":
        return LIGER_CHUNKS * setup.weight_bytes * setup.micro_batch_tokens * setup.shape.width
    return CHUNK_BYTES.get(setup.device, LARGE_CHUNK_BYTES)
