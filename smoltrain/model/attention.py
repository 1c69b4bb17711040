"""Which attention kernel runs, why, and the one function that calls it.

Legend: B batch, T queries, S keys (more than T only with a cache), H query heads, K key-value heads, E width per head.
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smoltrain.errors import Problem, UserError


@dataclass(frozen=True)
class Kernel:
    """An attention kernel and, in a few words, why it was chosen."""

    name: Literal["flash-attn", "sdpa", "math"]
    reason: str
    flash: Callable[..., Any] | None = field(default=None, repr=False)


def choose(
    requested: Literal["auto", "flash", "sdpa", "math"],
    device: torch.device,
    dtype: torch.dtype,
    *,
    dropout: float = 0.0,
) -> Kernel:
    """The kernel for attention on this device, in this dtype, with this dropout on the attention weights.

    Errors: UserError when 'flash' is asked for and cannot run here.
    """
    if requested in ("sdpa", "math"):
        return Kernel(requested, f"engine.attention is {requested}")
    flash, reason = _flash(device, dtype, dropout)
    if flash is not None:
        return Kernel("flash-attn", reason, flash)
    if requested == "flash":
        want = "the package flash-attn on a CUDA device in bf16 or fp16"
        raise UserError(Problem("the kernel flash cannot run", reason, want, "engine.attention"))
    return Kernel("sdpa", reason)


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, kernel: Kernel, *, dropout: float = 0.0) -> Tensor:
    """Causal attention, [B, H, T, E]. The queries are the last T of S positions: query i sees keys 0 to S - T + i.

    K divides H (GQA, Ainslie et al. 2023): consecutive query heads share a key-value head, which is not copied.
    """
    if kernel.flash is not None:
        # FlashAttention takes [B, T, H, E] and aligns its causal mask to the bottom right (since 2.1), as we want it.
        q, k, v = (x.transpose(1, 2) for x in (q_BHTE, k_BKSE, v_BKSE))
        options = {"dropout_p": dropout} if dropout else {}  # version 3 does not know the word
        out = kernel.flash(q, k, v, causal=True, **options)
        out_BTHE = out[0] if isinstance(out, tuple) else out  # early releases of version 3 add the log-sum-exp
        return out_BTHE.transpose(1, 2)
    T, S = q_BHTE.size(2), k_BKSE.size(2)
    # SDPA's is_causal aligns the mask to the top left, which is right for T == S only. A lone query sees every key.
    mask_TS = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q_BHTE.device).tril(S - T)
    with sdpa_kernel(SDPBackend.MATH) if kernel.name == "math" else nullcontext():
        return F.scaled_dot_product_attention(
            q_BHTE,
            k_BKSE,
            v_BKSE,
            attn_mask=mask_TS,
            dropout_p=dropout,
            is_causal=1 < T == S,
            enable_gqa=q_BHTE.size(1) != k_BKSE.size(1),
        )


def _flash(device: torch.device, dtype: torch.dtype, dropout: float) -> tuple[Callable[..., Any] | None, str]:
    """The fastest flash_attn_func that can run here, or None; and the reason (Dao 2023; Shah et al. 2024)."""
    if device.type != "cuda":
        return None, f"FlashAttention needs CUDA, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return None, f"FlashAttention needs bf16 or fp16, the dtype is {str(dtype).removeprefix('torch.')}"
    generation = torch.cuda.get_device_capability(device)[0]
    if generation < 8:
        return None, f"FlashAttention needs compute capability 8.0, the device has {generation}.x"
    if generation == 9 and not dropout and (flash := _imported("flash_attn_interface")):
        return flash, "FlashAttention 3 is installed and the device is a Hopper GPU"
    if flash := _imported("flash_attn"):
        return flash, "FlashAttention 2 is installed"
    return None, "flash-attn is not installed, or not for this torch"


def _imported(package: str) -> Callable[..., Any] | None:
    try:
        return importlib.import_module(package).flash_attn_func
    except (ImportError, AttributeError):  # a build for another torch fails to load with ImportError
        return None
