"""Memory of one rank at its fullest, by part.

Training has three moments that can be the fullest one: when all activations and the loss's own tensors are there, when
backward ends with all gradients, and the update. Each is a sum of named parts; the largest sum is the estimate.

Legend, as factors of bytes: N parameters of the model, P = N / world of one rank, c bytes of a weight (2 or 4), D
width, H heads, I width inside the MLP, V vocabulary, T tokens of a row, n tokens of a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from smoltrain.engine.optimizer import FP32_BYTES
from smoltrain.estimate.case import TrainingSetup
from smoltrain.kernels import cpu_attention
from smoltrain.kernels.loss import CHUNK_BYTES, LARGE_CHUNK_BYTES, LIGER_CHUNKS

MIB, GIB = 2**20, 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "reduction", "update", "checkpoint", "rest")
SUM_BYTES = 4  # bytes of each parameter's sum of gradients: fp32
# The rest, measured. CPU: Python, torch, DeepSpeed and the data of a model that weighs nothing, resident; what
# inductor loads to compile; what malloc keeps between tensors, as a share of those that come and go. CUDA: context,
# NCCL and cuBLAS, which torch.cuda.max_memory_allocated does not see; and blocks that do not fit, as a share.
CPU_BASE, COMPILER = 503 * MIB, 66 * MIB
CUDA_BASE, CUDA_FRAGMENTATION = 1000 * MIB, 0.03
BUCKET_FRAGMENTATION = (
    12  # bytes a parameter: malloc puts DeepSpeed's bucket elsewhere each time, and touches new pages
)
GATHERED_FRAGMENTATION = 6  # likewise the weights that ZeRO-3 gathers
MALLOC_KEEPS_FREED = True  # as launch/train.py asks malloc


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, at the fullest `moment`."""

    parts: Mapping[str, float]
    moment: str

    @property
    def total(self) -> float:
        """Bytes that the rank's device must have; on a CPU its largest resident set."""
        return sum(self.parts.values())

    def __getitem__(self, part: str) -> float:
        return self.parts.get(part, 0.0)


Parts = Mapping[str, float]


def estimate_memory(case: TrainingSetup, base: float | None = None) -> MemoryEstimate:
    """The estimate; `base` (bytes) takes the place of the measured part of the rest."""
    states, ending, updating = _zero_state_bytes(case)
    kept, one_more = activation_bytes(case)
    keeps, works = loss_bytes(case)
    embedding = case.weight_bytes * case.shape.vocabulary * case.shape.width
    moments = {
        "loss": {"activations": kept, "logits": max(works, keeps)},
        "backward begins": {"activations": kept + one_more, "logits": keeps},
        # A tied table has two gradients on a GPU, of the head and of the look-up, and their sum.
        "backward ends": {**ending, "logits": embedding * (3 if case.shape.tied and case.device == "cuda" else 1)},
        "update": updating,
    }
    held = sum(states.values())
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    on_top = sum(moments[moment].values())
    parts = {part: states.get(part, 0.0) + moments[moment].get(part, 0.0) for part in PARTS}
    if case.device == "cpu":
        parts["checkpoint"] = checkpoint_copy_bytes(case)
        on_top += parts["checkpoint"]
        if base is None:
            base = CPU_BASE + case.compiled_update * COMPILER
        parts["rest"] = base + MALLOC_KEEPS_FREED * _fragmentation_bytes(case, on_top)
    else:
        parts["rest"] = (CUDA_BASE if base is None else base) + CUDA_FRAGMENTATION * (held + on_top)
    return MemoryEstimate(parts, moment)


def checkpoint_copy_bytes(case: TrainingSetup) -> float:
    """Bytes of host memory on rank 0 while a checkpoint is written: its masters and moments, the weights twice."""
    N = case.shape.parameters
    return case.saves * (
        (FP32_BYTES + case.optimizer_kind.state_bytes) * N / (case.world if case.stage else 1)
        + 2 * case.weight_bytes * N
    )


def _fragmentation_bytes(case: TrainingSetup, on_top: float) -> float:
    """Bytes that malloc keeps on a CPU and nobody uses, at the moment with `on_top` of what is always there.

    A model begins in fp32, and where it left room activations lie later; not so the casts between its weights.
    """
    N, c = case.shape.parameters, case.weight_bytes
    if case.once_a_step:
        return max(4 * N - on_top, c * N if c < 4 else 0.0)
    bucket = BUCKET_FRAGMENTATION * case.uses_bucket * min(N, case.bucket)
    gathered = GATHERED_FRAGMENTATION * N if case.stage == 3 and case.world > 1 else 0
    return max(6 * N - on_top, 0.05 * on_top) + bucket + gathered


def _zero_state_bytes(case: TrainingSetup) -> tuple[Parts, Parts, Parts]:
    """What is always there; what comes on top when backward ends; what comes on top in the update.

    ZeRO (Rajbhandari et al. 2020, section 5) parts masters and moments among the ranks from stage 1 on, gradients from
    2, weights from 3. What DeepSpeed 0.19.8 really holds differs, and was counted by torch's profiler, allocation by
    allocation, at stages 0 to 3 on one rank and two:

    stage 0 (fp32)       weights 4N, gradients 4N, moments 8N
    once a step (1, 2)   weights cN, sums of gradients 4N on every rank, masters and moments 12P; of a lone micro-batch
                         on a lone rank cN
    2, each micro-batch  weights cN, gradients 4P, 12P; and for a bucket of b elements at the end of backward: the
                         bucket cb (CUDA holds it whole, on a CPU only what was touched counts), 6b of casts to fp32
    1 in bf16            weights 2N, gradients 4N + 2N, 12P; 4b
    3                    weights cP, cN of them gathered, gradients 4P, 12P, a bucket of fp32 4b, 6b
    """
    N, c, W = case.shape.parameters, case.weight_bytes, case.world
    P, b = N / W, min(N, case.bucket)
    kind = case.optimizer_kind
    eager_update = (
        0 if case.device == "cuda" else kind.temporary_bytes * P
    )  # torch's fused kernel has no temporaries, the other two
    bucket = case.bucket if case.device == "cuda" else b
    masters = FP32_BYTES + kind.state_bytes
    if case.stage == 0:
        states = {"weights": c * N, "gradients": SUM_BYTES * N, "optimizer": kind.state_bytes * N}
        return states, {"reduction": SUM_BYTES * b}, {"update": 0.0}
    if case.once_a_step:
        states = {"weights": c * N, "gradients": case.gradient_sum_bytes * N, "optimizer": masters * P}
        if case.device == "cpu":  # in shared memory, where a rank reads its part of the others' sums, and their weights
            states["reduction"] = (W - 1) * (SUM_BYTES + c) * P
        return states, {}, {"update": 0 if case.compiled_update else eager_update}
    if case.stage == 1 and case.precision == "bf16":
        states = {"weights": c * N, "gradients": (SUM_BYTES + c) * N, "optimizer": masters * P}
        return states, {"reduction": SUM_BYTES * b}, {"update": eager_update}
    states = {"weights": c * N, "gradients": SUM_BYTES * P, "optimizer": masters * P, "reduction": c * bucket}
    ending = {"reduction": (SUM_BYTES + 2) * b}
    if case.stage == 3:
        states |= {"weights": c * P, "reduction": SUM_BYTES * bucket}
        ending |= {"weights": c * N if W > 1 else 0.0}
        eager_update += SUM_BYTES * P  # of gradients cast for the optimizer
    return states, ending, {"update": eager_update}


def activation_bytes(case: TrainingSetup) -> tuple[float, float]:
    """(kept from forward to backward, on top of that while a block is differentiated), bytes.

    Full recomputation keeps the input of each block (Chen et al. 2016), every n-th that of each n-th block and all of
    the others, selective what matmuls and attention give (Korthikanti et al. 2022, section 5, keep more).
    """
    case_bytes, n, s = case.weight_bytes, case.tokens, case.shape
    whole, entry = n * block_activation_bytes(case), case_bytes * n * s.width
    recomputed = num_recomputed_blocks(case)
    per_block = entry
    if case.recompute == "selective":
        per_block += case_bytes * n * (3 * s.width + 2 * s.kv_width + (3 if s.gated else 2) * s.inner) + 4 * n * s.heads
    final = n * _norm_activation_bytes(case)  # the norm before the head
    kept = (s.layers - recomputed) * whole + recomputed * per_block + final
    work = case_bytes * n * (3 * s.inner + 3 * s.width)  # gradients on their way through an MLP
    return kept, work + (whole if recomputed else 0)


def num_recomputed_blocks(case: TrainingSetup) -> int:
    """Blocks that run once more in the backward pass; selective parts of all, or none where the compiler chooses."""
    mode, layers = case.recompute, case.shape.layers
    if isinstance(mode, int):
        return -(-layers // mode)
    return 0 if mode == "none" or (mode == "selective" and case.compiled_blocks) else layers


def block_activation_bytes(case: TrainingSetup) -> float:
    """Bytes a token that autograd keeps of one block, as saved_tensors_hooks count them in the tests.

    Each matmul keeps its input (Korthikanti et al. 2022, section 4): the norms' outputs cD twice, the context cD, the
    MLP's product cI; attention keeps q, k and v, c(D + 2 D_kv); the activation its inputs, cI each; a norm its own
    input, cD. An RMSNorm on a CPU is no single operation and keeps 8D in fp32 instead, and so do the rotary positions
    cD more, whose output lies in the order of the heads. A compiled block keeps less: the gate's activation and the
    insides of the norms are computed anew.
    """
    s, c = case.shape, case.weight_bytes
    kept = 2 * _norm_activation_bytes(case) + c * (2 * s.width + 2 * s.kv_width)  # the norms, q, k, v, the context
    if case.device == "cpu" and s.rotary and case.attention == "sdpa":
        kept += c * s.width
    kept += c * s.inner * (2 + s.gated + (s.gated and not case.compiled_blocks))
    if s.dropout:
        kept += 2 * s.width  # a byte for what is dropped
    return kept + attention_activation_bytes(case)


def _norm_activation_bytes(case: TrainingSetup) -> float:
    """Bytes a token that a norm keeps, its output included, which the matmul behind it keeps."""
    s, c = case.shape, case.weight_bytes
    if not s.rmsnorm:
        return 2 * c * s.width + 2 * c
    composed = case.device == "cpu" and not case.compiled_blocks
    return (8 + c) * s.width + 4 if composed else 2 * c * s.width + 4


def attention_activation_bytes(case: TrainingSetup) -> float:
    """Bytes a token that the attention kernel keeps beside q, k, v and the context.

    Flash kernels keep the log-sum-exp of each row in fp32. smoltrain's blocked kernel keeps the probabilities of each
    block of queries, H (T + block) / 2 of them a token, of rows that are not too long. math keeps them all, in the
    dtype, and what a dropout on them drops.
    """
    s, c, T = case.shape, case.weight_bytes, case.length
    if case.attention == "blocked":
        return (
            c * s.heads * (T + min(T, cpu_attention.QUERIES_PER_BLOCK)) / 2
            if T <= cpu_attention.MAX_KEPT_LENGTH
            else 0.0
        )
    return 2 * c * s.heads * T if case.attention == "math" else 4.0 * s.heads


def loss_bytes(case: TrainingSetup) -> tuple[float, float]:
    """(kept by the loss for its backward, while it works), bytes: logits and the gradients that take their place.

    plain: the logits cnV, in fp32, their log-softmax, and the gradients of both: 12nV at the fullest, 4nV kept.
    fused, liger: a chunk of logits, the gradient of the hidden states cnD and of the table, 4VD in fp32 where chunks
    are added up; scaled by the incoming gradient they are copied. recomputed: a chunk as plain, nothing kept but cnD.
    """
    s, c, n = case.shape, case.weight_bytes, case.tokens
    logits, table, hidden = c * n * s.vocabulary, s.vocabulary * s.width, c * n * s.width
    if case.loss == "plain":
        return 4 * n * s.vocabulary, 12.0 * n * s.vocabulary
    budget = CHUNK_BYTES.get(case.device, LARGE_CHUNK_BYTES)
    chunk = min(logits, LIGER_CHUNKS * hidden if case.loss == "liger" else budget)
    if case.loss == "recomputed":
        return 0.0, chunk * (12 + c) / c + c * table
    kept = hidden + (4 if chunk < logits else c) * table
    return kept, max(kept + chunk, kept + hidden + c * table)
