"""The training loss: cross entropy fused with the vocabulary head, in which way it is computed, and why.

With a vocabulary of 49,152 the logits of 16,384 tokens take 1.5 GiB in bf16, and several times that as fp32 on the way
to their gradient. So they exist a chunk of tokens at a time, and become their own gradient at once: what is kept for
the backward pass is no larger than the gradients of the hidden states and of the weight (Liger, Hsu et al. 2024).

Legend: N tokens (rows of the batch, laid end to end), C tokens of a chunk, D width of the residual stream,
V vocabulary.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from smoltrain.kernels.compile import CompilableFunction
from smoltrain.kernels.fp32_sums import accumulate_fp32

IGNORE_INDEX = -100  # label of a token that is no target
MIB = 2**20
CHUNK_BYTES = {"cpu": 48 * MIB}  # of logits: 512 tokens of a vocabulary of 49,152 in bf16
LARGE_CHUNK_BYTES = 256 * MIB  # for all other devices, which starve on small products: a 256th of a GPU of 64 GiB
SMALLEST_CHUNK_BYTES = 128 * MIB  # of a GPU; the largest is 1 GiB
LARGEST_CHUNK_BYTES = 1024 * MIB
CHUNK_SHARE = 256  # of a GPU's memory: a 256th
ROWS_MULTIPLE = 256  # rows of a chunk on a GPU: a multiple of the tiles of cuBLAS, so that none is part empty
BLOCK_BYTES = 6 * MIB  # of fp32 softmax that stays in a CPU's caches from one operation to the next
ROWS_PER_SLICE = 16384  # rows of the weight's gradient that are converted at a time
RANGE_PREFIX = "smoltrain: "  # of a range in torch's profiler, which training/step_recorder.py makes more of
LOSS_RANGE = "loss"
LIGER_MODULE = "liger_kernel.transformers.functional"
LIGER_ARGUMENTS = {"ignore_index", "reduction", "accum_dtype", "chunk_mem_const"}
LIGER_CHUNKS = 8  # times Liger's own budget for logits, which is the size of the hidden states: few rows, if D is small


@dataclass(frozen=True)
class LossKernel:
    """A way to compute the loss and, in a few words, why it was chosen; `compiles` where its softmax is compiled.

    plain: all logits at once. fused: a chunk at a time, the gradients made in the forward pass. liger: the same by
    liger-kernel. recomputed: a chunk at a time, and once more in the backward pass, where its gradients are made.
    """

    name: Literal["fused", "recomputed", "liger", "plain"]
    reason: str
    compiles: bool = False
    liger: Callable[..., Any] | None = field(default=None, repr=False)


PLAIN_LOSS = LossKernel("plain", "the default")


def choose_loss_kernel(
    requested: Literal["auto", "fused", "plain"], device: torch.device, dtype: torch.dtype, *, compiles: bool,
    z_loss: float = 0.0,
) -> LossKernel:  # fmt: skip
    """The kernel for weights on this device, in this dtype; `auto` prefers Liger's to our own, but not with z_loss."""
    if requested == "plain":
        return LossKernel("plain", "engine.loss is plain")
    if dtype == torch.float16:
        # In the forward pass the loss is not scaled yet: gradients below 6e-8 would be lost for good.
        return LossKernel("recomputed", "fp16 gradients are made in the backward pass, where the loss scale is known")
    if requested == "fused":
        return LossKernel("fused", "engine.loss is fused", compiles)
    if device.type != "cuda":
        return LossKernel("fused", f"Liger's kernel needs CUDA, the device is {device.type}", compiles)
    if z_loss:
        # Its value contains them, so that they would have to be taken off again: losses with 3 digits.
        return LossKernel("fused", "Liger's kernel rounds z-losses to the dtype of the model", compiles)
    liger, reason = _import_liger()
    if liger is None:
        return LossKernel("fused", reason, compiles)
    return LossKernel("liger", reason, liger=liger)


@record_function(RANGE_PREFIX + LOSS_RANGE)
def summed_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, kernel: LossKernel = PLAIN_LOSS, z_loss: float = 0.0
) -> Tensor:
    """The SUM of -log p(label) over all tokens whose label is not IGNORE_INDEX, an fp32 scalar (0 if there is none).

    A sum, because only the caller knows the number of valid tokens over all micro-batches and ranks of a step.
    The labels are shifted already: labels_N[i] is the target of hidden_ND[i].

    With `z_loss` the gradient is that of the sum plus z_loss * sum(log(Z)^2), where Z is the denominator of the softmax
    (PaLM: Chowdhery et al. 2022, section 5), which keeps logits from drifting. The value is the sum alone, so that
    losses can be compared whatever z_loss is.
    """
    learns = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    if kernel.name == "plain" or not labels_N.numel():
        return summed_cross_entropy_of_logits(F.linear(hidden_ND, weight_VD), labels_N, z_loss)
    if kernel.name == "recomputed" or not learns:
        return _recomputed_cross_entropy(hidden_ND, weight_VD, labels_N, z_loss)
    if kernel.liger is not None:
        assert not z_loss, "choose_loss_kernel does not take liger then"
        return _liger_cross_entropy(hidden_ND, weight_VD, labels_N, kernel.liger)
    # In a caller that is compiled this runs as it is written; the softmax in it is compiled by itself.
    fused: Any = torch.compiler.disable(_FusedCrossEntropy.apply)
    return fused(hidden_ND, weight_VD, labels_N, kernel.compiles, z_loss)


@record_function(RANGE_PREFIX + LOSS_RANGE)
def summed_cross_entropy_of_logits(logits_NV: Tensor, labels_N: Tensor, z_loss: float = 0.0) -> Tensor:
    """`summed_cross_entropy` for a model whose logits are more than a product (scaled or soft-capped ones)."""
    # In bf16 the log-softmax would be rounded to 3 digits.
    wide_NV = logits_NV.to(_accumulation_dtype(logits_NV.dtype))
    loss = F.cross_entropy(wide_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
    if not z_loss:
        return loss
    log_z_N = wide_NV.logsumexp(-1).masked_fill(labels_N == IGNORE_INDEX, 0.0)
    penalty = z_loss * log_z_N.square().sum()
    return loss + (penalty - penalty.detach())  # the gradient of both, the value of the loss alone


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _tokens_per_chunk(N: int, row_bytes: int, device: torch.device) -> int:
    """Tokens in a chunk: as few chunks as the bytes allow, all of one size but the last, as each size is compiled."""
    if device.type in CHUNK_BYTES:
        most = max(1, CHUNK_BYTES[device.type] // row_bytes)
        return math.ceil(N / math.ceil(N / most))
    most = _chunk_bytes(_device_memory_bytes(device)) // row_bytes
    most = max(ROWS_MULTIPLE, most // ROWS_MULTIPLE * ROWS_MULTIPLE)
    rows = math.ceil(N / math.ceil(N / most))
    return min(N, math.ceil(rows / ROWS_MULTIPLE) * ROWS_MULTIPLE)


def _chunk_bytes(memory_bytes: int | None) -> int:
    """Bytes of a chunk's logits on a device with so much memory; None: it is not known."""
    if memory_bytes is None:
        return LARGE_CHUNK_BYTES
    return min(max(memory_bytes // CHUNK_SHARE, SMALLEST_CHUNK_BYTES), LARGEST_CHUNK_BYTES)


@functools.cache
def _device_memory_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA device, all of it; None on others, and where no driver can be asked."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def _recomputed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, z_loss: float) -> Tensor:
    """The plain loss of each chunk, whose logits are computed anew in the backward pass (Chen et al. 2016)."""
    rows = _tokens_per_chunk(len(labels_N), len(weight_VD) * hidden_ND.element_size(), hidden_ND.device)
    run_checkpointed = partial(checkpoint, summed_cross_entropy, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(hidden_ND.split(rows), labels_N.split(rows), strict=True)
    return torch.stack([run_checkpointed(h, weight_VD, y, PLAIN_LOSS, z_loss) for h, y in chunks]).sum()


class _FusedCrossEntropy(torch.autograd.Function):
    """The loss with its gradients made in the forward pass, while a chunk's logits are there.

    The backward pass multiplies them by the gradient of its own output. It needs no weight, which ZeRO-3 may have
    scattered again, and it changes nothing that is kept, so that it can run twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, compiles: bool, z_loss: float
    ) -> Tensor:
        """See summed_cross_entropy."""
        N, _ = hidden_ND.shape
        V = len(weight_VD)
        dtype = hidden_ND.dtype
        rows = _tokens_per_chunk(N, V * hidden_ND.element_size(), hidden_ND.device)
        replace_logits = _replace_logits_by_gradient.compiled if compiles else _replace_logits_in_blocks
        logits_CV = hidden_ND.new_empty(rows, V)
        losses_N = hidden_ND.new_empty(N, dtype=_accumulation_dtype(dtype))
        dhidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        dweight_VD = None
        if ctx.needs_input_grad[1] and rows < N:
            dweight_VD = torch.zeros_like(weight_VD, dtype=_accumulation_dtype(dtype))
        for start in range(0, N, rows):
            chunk = slice(start, start + rows)
            hidden_CD = hidden_ND[chunk]
            labels_C = labels_N[chunk]
            dlogits_CV = torch.mm(hidden_CD, weight_VD.T, out=logits_CV[: len(labels_C)])
            losses_N[chunk] = replace_logits(dlogits_CV, labels_C, z_loss)  # and now they are what their name says
            if dhidden_ND is not None:
                torch.mm(dlogits_CV, weight_VD, out=dhidden_ND[chunk])
            if dweight_VD is not None:
                _accumulate_weight_gradient(dweight_VD, dlogits_CV, hidden_CD)
            elif ctx.needs_input_grad[1]:  # of a lone chunk: nothing to add up
                dweight_VD = torch.mm(dlogits_CV.T, hidden_CD)
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.dtype = dtype
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`gradient` stays a tensor: to look at it would make the host wait for the device."""
        dhidden_ND, dweight_VD = ctx.saved_tensors
        scaled = [None if x is None else _scale_gradient(x, gradient, ctx.dtype) for x in (dhidden_ND, dweight_VD)]
        return (*scaled, None, None, None)


@CompilableFunction
def _replace_logits_by_gradient(logits_CV: Tensor, labels_C: Tensor, z_loss: float) -> Tensor:
    """The tokens' losses [C]; the gradient of their sum, z-loss included, takes the place of the logits."""
    valid_C1 = (labels_C != IGNORE_INDEX)[:, None]
    label_C1 = labels_C.clamp(min=0)[:, None]
    log_p_CV = torch.log_softmax(logits_CV, -1, dtype=_accumulation_dtype(logits_CV.dtype))
    if torch.compiler.is_compiling():
        # Summed up, not gathered: torch 2.11's loop for CPUs would gather from the logits after copy_ below has written
        # there, and the loss was 12 % off.
        is_label_CV = torch.arange(logits_CV.size(-1), device=logits_CV.device) == labels_C[:, None]
        log_p_C1 = torch.where(is_label_CV, log_p_CV, 0.0).sum(-1, keepdim=True)
    else:
        is_label_CV = None
        log_p_C1 = log_p_CV.gather(-1, label_C1)
    factor_C1 = valid_C1.to(log_p_C1.dtype)
    losses_C = torch.where(valid_C1, -log_p_C1, 0.0).squeeze(-1)
    if z_loss:
        log_z_C1 = logits_CV.gather(-1, label_C1) - log_p_C1
        factor_C1 = factor_C1 * (1 + 2 * z_loss * log_z_C1)
    # The label's 1 is taken off before the rounding to bf16, which would leave nothing of a small 1 - p.
    dlogits_CV = log_p_CV.exp_().mul_(factor_C1)
    if is_label_CV is not None:  # one loop with the rest, 3 times faster; eagerly it would be one more [C, V]
        dlogits_CV = dlogits_CV - is_label_CV.to(dlogits_CV.dtype)
    else:
        dlogits_CV.scatter_add_(-1, label_C1, -valid_C1.to(dlogits_CV.dtype))
    logits_CV.copy_(dlogits_CV)
    return losses_C


def _replace_logits_in_blocks(logits_CV: Tensor, labels_C: Tensor, z_loss: float) -> Tensor:
    """The same without a compiler; on a CPU in blocks that stay in its caches, twice as fast."""
    rows = len(labels_C)
    if logits_CV.device.type == "cpu":
        rows = max(1, BLOCK_BYTES // (logits_CV.size(-1) * _accumulation_dtype(logits_CV.dtype).itemsize))
    blocks = zip(logits_CV.split(rows), labels_C.split(rows), strict=True)
    return torch.cat([_replace_logits_by_gradient(logits, labels, z_loss) for logits, labels in blocks])


def _accumulate_weight_gradient(dweight_VD: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
    """dweight += dlogits^T @ hidden, the sum in dweight's dtype. A CPU has no product of bf16 that ends in fp32."""
    if dweight_VD.dtype == hidden_CD.dtype:
        dweight_VD.addmm_(dlogits_CV.T, hidden_CD)
        return
    if _can_add_products_in_fp32(hidden_CD.device.type):
        torch.addmm(dweight_VD, dlogits_CV.T, hidden_CD, out_dtype=dweight_VD.dtype, out=dweight_VD)
        return
    for start in range(0, len(dweight_VD), ROWS_PER_SLICE):
        ids = slice(start, start + ROWS_PER_SLICE)
        accumulate_fp32(dweight_VD[ids], dlogits_CV[:, ids].T @ hidden_CD)


def _can_add_products_in_fp32(device_type: str) -> bool:
    """Whether torch.addmm adds a product of bf16 or fp16 matrices to a sum in fp32: by cuBLAS, without rounding it.

    Read in torch 2.11, the first with this overload that was seen to take an fp32 sum as its `input` (pytorch#167931).
    """
    return device_type == "cuda" and torch.version.hip is None and torch.__version__ >= "2.11"


def _scale_gradient(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, rounded once to dtype, without a whole copy of x in its own dtype."""
    if x.dtype == dtype:
        return x * factor
    scaled = torch.empty_like(x, dtype=dtype)
    for scaled_rows, rows in zip(scaled.split(ROWS_PER_SLICE), x.split(ROWS_PER_SLICE), strict=True):
        scaled_rows.copy_(rows * factor)
    return scaled


def _import_liger() -> tuple[Callable[..., Any] | None, str]:
    """(Liger's function or None, the reason): None unless it is installed and takes all LIGER_ARGUMENTS."""
    try:
        function = importlib.import_module(LIGER_MODULE).liger_fused_linear_cross_entropy
    except (ImportError, AttributeError):
        return None, "liger-kernel (extra gpu) is not installed, or not for this torch"
    if not set(inspect.signature(function).parameters) >= LIGER_ARGUMENTS:
        return None, "liger-kernel is installed, but older than 0.8.5"
    return function, "liger-kernel is installed"


def _liger_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, liger: Callable[..., Any]) -> Tensor:
    """Liger's loss, which makes the gradients in the forward pass, as ours does (read in version 0.8.5).

    It waits for the device twice, to count the labels and to see whether its incoming gradient is 1. It scales its
    gradients in place, so the backward pass can run once only.
    """
    # Without accum_dtype the weight's gradient is added up in bf16.
    return liger(
        hidden_ND, weight_VD, labels_N, ignore_index=IGNORE_INDEX, reduction="sum",
        accum_dtype=torch.float32, chunk_mem_const=LIGER_CHUNKS,
    )  # fmt: skip
