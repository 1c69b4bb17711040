"""Causal self-attention: which kernel computes it, why, and the one function that calls it.

The kernels: FlashAttention (flash_attention.py), torch's scaled_dot_product_attention (SDPA), our own for CPUs
(cpu_attention.py), and the definition ("math"). Documents that are packed in one row are kept apart: by their places
in the row where the kernel takes these ("varlen"), else by a mask.

Legend: B batch, T queries, S keys (more than T only with a cache), H query heads, K key-value heads, E width per head,
N tokens of all rows laid end to end (B * T).
"""

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smoltrain.errors import Problem, UserError
from smoltrain.kernels.cpu_attention import blocked_attention, why_blocked_cannot_run
from smoltrain.kernels.document_starts import find_document_starts
from smoltrain.kernels.flash_attention import CUDNN, FlashAttention, find_flash_attention, rank_attention_kernels

BACKENDS_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TORCH_VARLEN_OPERATOR = "torch_attn::_varlen_attn"


@dataclass(frozen=True)
class AttentionKernel:
    """An attention kernel and, in a few words, why it was chosen.

    `varlen` keeps packed documents apart by their places instead of a mask: (q, k, v, starts, starts, T, T), q
    [N, H, E] and k, v [N, K, E]. `package` is that of `flash`. `sdpa_first` is asked first of SDPA's own kernels.
    `operators` compute the forward pass, beside those of SDPA: selective gradient checkpointing keeps their outputs.
    """

    name: Literal["flash-attn", "blocked", "sdpa", "math"]
    reason: str
    flash: Callable[..., Any] | None = field(default=None, repr=False)
    varlen: Callable[..., Any] | None = field(default=None, repr=False)
    package: str = ""
    sdpa_first: SDPBackend | None = None
    operators: tuple[str, ...] = ()


class PackedDocuments(NamedTuple):
    """Where packed documents begin, in the one form that the kernel takes; made once per forward for all blocks.

    A tuple, because that is where ZeRO-3 finds the tensors that a block is given.
    """

    starts: Tensor | None = None  # the place of each first token among the N, padded with N: see document_starts.py
    mask_B1TT: Tensor | None = None  # added to the scores: 0 for an earlier key of the same document, else -inf

    @classmethod
    def from_positions(
        cls, positions_BT: Tensor, kernel: AttentionKernel, dtype: torch.dtype, num_documents: int | None = None
    ) -> "PackedDocuments":
        """The documents of full rows, of which there are at most so many; each begins where positions do, at 0."""
        if kernel.varlen is not None:
            return cls(starts=find_document_starts(positions_BT, num_documents))
        document_BT = (positions_BT == 0).cumsum(1)
        seen_BTT = (document_BT[:, :, None] == document_BT[:, None]).tril()
        # Not boolean: SDPA would turn it into this in every block anew, and keep each of them for the backward pass.
        mask_BTT = torch.zeros_like(seen_BTT, dtype=dtype).masked_fill_(~seen_BTT, float("-inf"))
        return cls(mask_B1TT=mask_BTT[:, None])


def choose_attention_kernel(
    requested: Literal["auto", "flash", "blocked", "sdpa", "math"], device: torch.device, dtype: torch.dtype, *,
    dropout: float = 0.0, document_mask: bool = False, head_width: int | None = None,
) -> AttentionKernel:  # fmt: skip
    """The kernel for attention on this device, in this dtype, with this dropout on the attention weights.

    `head_width` is E of our own decoder; None for a model of transformers, which has no kernel of torch for documents,
    nor ours for CPUs. Errors: UserError when 'flash' or 'blocked' is asked for and cannot run here.
    """
    by_mask = "; a mask keeps documents apart" if document_mask else ""
    if requested in ("sdpa", "math"):
        return AttentionKernel(requested, f"engine.attention is {requested}{by_mask}")
    if requested == "blocked":
        _check_blocked_can_run(device, head_width)
        return AttentionKernel("blocked", f"engine.attention is blocked{by_mask}")
    no_flash = _why_no_flash(device, dtype)
    if requested == "auto" and device.type == "cpu":
        why_not_blocked = _why_blocked_is_not_faster(dtype) if head_width is not None else no_flash
        if why_not_blocked is not None:
            return AttentionKernel("sdpa", why_not_blocked + by_mask)
        return AttentionKernel("blocked", f"faster than SDPA on a CPU with AVX512-bf16{by_mask}")

    if no_flash is not None:
        if requested == "flash":
            raise _flash_error(no_flash)
        return AttentionKernel("sdpa", no_flash + by_mask)
    return _choose_on_cuda(requested, device, dtype, dropout, document_mask, head_width)


def _choose_on_cuda(
    requested: Literal["auto", "flash"], device: torch.device, dtype: torch.dtype, dropout: float,
    document_mask: bool, head_width: int | None,
) -> AttentionKernel:  # fmt: skip
    """`choose_attention_kernel` on a device and in a dtype in which FlashAttention can run."""
    ranked = rank_attention_kernels(
        torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0,
        dropout=dropout, head_width=head_width, document_mask=document_mask,
    )  # fmt: skip
    by_mask = "; a mask keeps documents apart" if document_mask else ""
    if not ranked:
        reason = f"no FlashAttention takes heads {head_width} wide"
        if requested == "flash":
            raise _flash_error(reason)
        return AttentionKernel("sdpa", reason + by_mask)
    cudnn_is_faster = CUDNN in ranked and requested == "auto"
    packages = ranked[: ranked.index(CUDNN)] if cudnn_is_faster else [name for name in ranked if name != CUDNN]
    flash, reason = find_flash_attention(packages, device, dtype, head_width=head_width, document_mask=document_mask)
    if flash is not None:
        return _flash_kernel(flash, reason, dropout, head_width, document_mask)
    if requested == "flash":
        raise _flash_error(reason)
    if cudnn_is_faster:
        reason = f"{reason}; SDPA asks cuDNN first, which is faster on this GPU than FlashAttention 2"
        return AttentionKernel("sdpa", reason, sdpa_first=SDPBackend.CUDNN_ATTENTION)
    if not document_mask or head_width is None:
        return AttentionKernel("sdpa", reason + by_mask)
    varlen, how = _import_torch_varlen(dropout, head_width)
    operators = (TORCH_VARLEN_OPERATOR,) if varlen is not None else ()
    return AttentionKernel("sdpa", f"{reason}; {how} keeps documents apart", varlen=varlen, operators=operators)


def _flash_kernel(
    flash: FlashAttention, reason: str, dropout: float, head_width: int | None, document_mask: bool
) -> AttentionKernel:
    """The kernel that runs on `flash`."""
    if flash.torch_implementation is None:
        how = "it"
        varlen = flash.documents
        first = None
    else:
        assert head_width is not None, "only our own decoder takes it through SDPA"
        varlen, how = _import_torch_varlen(dropout, head_width)
        first = SDPBackend.FLASH_ATTENTION
    if document_mask:
        reason = f"{reason}; {how} keeps documents apart"
    return AttentionKernel("flash-attn", reason, flash.rows, varlen, flash.package, first, flash.operators)


def _flash_error(saw: str) -> UserError:
    want = "the package flash-attn on a CUDA device in bf16 or fp16"
    return UserError(Problem("the kernel flash cannot run", saw, want, "engine.attention"))


def causal_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, kernel: AttentionKernel, *,
    dropout: float = 0.0, documents: PackedDocuments | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention, [B, H, T, E]. The queries are the last T of S positions: query i sees keys 0 to S - T + i.

    K divides H (GQA, Ainslie et al. 2023): consecutive query heads share a key-value head, which is not copied.
    With `documents` (then S is T) it sees those of its own document only. `blocked` leaves a longer S to SDPA.
    """
    if kernel.name == "blocked" and q_BHTE.size(2) == k_BKSE.size(2):
        mask_B1TT = None if documents is None else documents.mask_B1TT
        return blocked_attention(q_BHTE, k_BKSE, v_BKSE, dropout=dropout, mask_B1TT=mask_B1TT)
    if documents is not None:
        return _packed_attention(q_BHTE, k_BKSE, v_BKSE, kernel, dropout, documents)
    if kernel.flash is not None:
        # FlashAttention takes [B, T, H, E] and aligns its causal mask to the bottom right (since 2.1), as we want it.
        q, k, v = (x.transpose(1, 2) for x in (q_BHTE, k_BKSE, v_BKSE))
        out_BTHE = _first_output(kernel.flash(q, k, v, causal=True, **_dropout_argument(dropout)))
        return out_BTHE.transpose(1, 2)
    T, S = q_BHTE.size(2), k_BKSE.size(2)
    # SDPA's is_causal aligns the mask to the top left, which is right for T == S only. A lone query sees every key.
    mask_TS = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q_BHTE.device).tril(S - T)
    with _sdpa_backends(kernel, q_BHTE.device, only_causal=T == S):
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask_TS, dropout_p=dropout,
            is_causal=1 < T == S, enable_gqa=q_BHTE.size(1) != k_BKSE.size(1),
        )  # fmt: skip


def _packed_attention(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, kernel: AttentionKernel, dropout: float, documents: PackedDocuments
) -> Tensor:
    """`causal_attention` within each of `documents`."""
    B, H, T, _ = q_BHTE.shape
    if documents.starts is not None:
        assert kernel.varlen is not None
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
        # T for the longest document: an upper bound will do, and the true one would be a sync and new code for each.
        out = kernel.varlen(q, k, v, documents.starts, documents.starts, T, T, **_dropout_argument(dropout))
        return _first_output(out).unflatten(0, (B, T)).transpose(1, 2)
    # With a mask and shared heads, CUDA has no fused kernel left but the one that keeps the T x T scores: copy.
    heads_per_key = H // k_BKTE.size(1)
    k_BHTE, v_BHTE = k_BKTE, v_BKTE
    if heads_per_key > 1:
        k_BHTE = k_BKTE.repeat_interleave(heads_per_key, dim=1)
        v_BHTE = v_BKTE.repeat_interleave(heads_per_key, dim=1)
    with _sdpa_backends(kernel, q_BHTE.device, only_causal=False):
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=documents.mask_B1TT, dropout_p=dropout)


def _sdpa_backends(kernel: AttentionKernel, device: torch.device, *, only_causal: bool) -> AbstractContextManager[Any]:
    """Within this context torch may choose from these of SDPA's kernels.

    cuDNN is for causal rows alone: its backward pass makes NaN of explicit masks for some T (pytorch#196678), and
    generation with few key-value heads goes wrong on it (pytorch#193893). What the kernel names is asked first, and
    then the others in torch's order: on Hopper and data-centre Blackwell most releases of torch put cuDNN first too,
    but a variable of the environment or another cuDNN changes that. A compiled block asks once, while it is traced.
    """
    if kernel.name == "math":
        return sdpa_kernel(SDPBackend.MATH)
    if device.type != "cuda":
        return nullcontext()
    if not only_causal:
        return sdpa_kernel(BACKENDS_WITHOUT_CUDNN)
    if kernel.sdpa_first is None:
        return nullcontext()
    return sdpa_kernel([kernel.sdpa_first, *BACKENDS_WITHOUT_CUDNN], set_priority=True)


def _dropout_argument(dropout: float) -> dict[str, float]:
    return {"dropout_p": dropout} if dropout else {}  # FlashAttention 3 and torch's varlen_attn do not know the word


def _first_output(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # early releases of version 3 add the log-sum-exp


def _check_blocked_can_run(device: torch.device, head_width: int | None) -> None:
    if device.type != "cpu":
        saw = f"the device is {device.type}"
    elif head_width is None:
        saw = "a model of transformers"
    else:
        saw = why_blocked_cannot_run()
    if saw is not None:
        want = "a decoder of smoltrain on a CPU; or auto"
        raise UserError(Problem("the kernel blocked cannot run", saw, want, "engine.attention"))


def _why_blocked_is_not_faster(dtype: torch.dtype) -> str | None:
    """Why SDPA is taken on this CPU; None where `python -m benchmarks.attention` found `blocked` faster."""
    cannot_run = why_blocked_cannot_run()
    if cannot_run is not None:
        return cannot_run
    has_avx512_bf16 = _has_avx512_bf16()
    if has_avx512_bf16 is None:
        return "blocked is faster with AVX512-bf16 only, and this torch does not say whether the CPU has it"
    if dtype not in (torch.bfloat16, torch.float32) or not has_avx512_bf16:
        return "blocked was found faster in bf16 and fp32, on CPUs with AVX512-bf16 only"
    return None


def _has_avx512_bf16() -> bool | None:
    """Whether this CPU multiplies bf16 numbers itself; None where torch does not say."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # public, but new in torch 2.13
    if capabilities is not None:
        return bool(capabilities().get("avx512_bf16", False))
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, in the torch before
    return None if is_supported is None else bool(is_supported())


def _why_no_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no FlashAttention can run, the package's or torch's own; None if one can."""
    if device.type != "cuda":
        return f"FlashAttention needs CUDA, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention needs bf16 or fp16, the dtype is {str(dtype).removeprefix('torch.')}"
    generation = torch.cuda.get_device_capability(device)[0]
    if generation < 8:
        return f"FlashAttention needs compute capability 8.0, the device has {generation}.x"
    return None


def _import_torch_varlen(dropout: float, head_width: int) -> tuple[Callable[..., Any] | None, str]:
    """torch's own FlashAttention over documents of any length, where it can run; and the words for what runs."""
    if dropout:
        return None, "a mask, as torch's varlen_attn has no dropout,"
    if head_width % 8 or head_width > 192:  # some GPUs have no backward pass beyond
        return None, f"a mask, as torch's varlen_attn takes no heads {head_width} wide,"
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        varlen = None
    parameters = inspect.signature(varlen).parameters if varlen is not None else {}
    if varlen is None or "window_size" not in parameters:
        return None, "a mask, as this torch has no causal varlen_attn,"
    options: dict[str, Any] = {"window_size": (-1, 0)}  # torch's words for causal
    # torch 2.11 has no such word: it lets shared heads through to the kernel, which knows them, forward and backward
    # (flash_attn/flash_api.cpp, mha_varlen_fwd and mha_varlen_bwd). Later ones refuse them unless they are announced.
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    return partial(varlen, **options), "torch's varlen_attn"
