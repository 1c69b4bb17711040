"""FlashAttention on CUDA: which version is the fastest on a GPU, is installed, and gives the right numbers here.

The order is a pure function of the device's compute capability, cuDNN's version and what the model needs. Sources:
FlashAttention 2 (Dao 2023) uses about a third of a Hopper GPU; version 3 (Shah et al. 2024, figures 5 and 6) and cuDNN
use the instructions of Hopper, twice as fast and more; version 4 is written for Hopper and Blackwell (its README). On
consumer Blackwell (12.x) version 4 has Ampere's instructions (flash_attn/cute/interface.py), as version 2 has; it has
no backward pass on Ampere and Ada (8.x).
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smoltrain.files import first_line
from smoltrain.kernels.flash_attention_4 import (
    FLASH4_OPERATOR,
    flash4_attention,
    flash4_varlen_attention,
    why_operators_do_not_fit,
)

FLASH2 = "flash_attn"
FLASH3 = "flash_attn_interface"
FLASH4 = "flash_attn.cute"  # of the package flash-attn-4; `flash_attn` is then no more than the folder around it
CUDNN = "cudnn"  # through torch's SDPA, and with every torch for CUDA
TITLES = {FLASH2: "FlashAttention 2", FLASH3: "FlashAttention 3", FLASH4: "FlashAttention 4"}
ARCHITECTURES = {8: "an Ampere or Ada", 9: "a Hopper", 10: "a Blackwell", 11: "a Blackwell", 12: "a Blackwell"}
# What computes the forward pass, as torch's dispatcher knows it: for rows and for documents.
FLASH_OPERATORS = {
    FLASH2: ("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
    FLASH3: ("flash_attn_3::_flash_attn_forward",),
    FLASH4: (FLASH4_OPERATOR,),
}
# torch can put these packages in the place of its own FlashAttention 2 (torch.nn.attention, from 2.11 on).
TORCH_IMPLEMENTATIONS = {FLASH3: "FA3", FLASH4: "FA4"}
MIN_CUDNN = 91501  # 9.15.1: the first that is right for lengths that 128 does not divide (pytorch#169849)
TRIAL_LENGTHS = (100, 156)  # of the documents of a trial's row
MAX_TRIAL_ERROR = 0.02  # relative, of bf16 or fp16 against fp32: ten times what rounding makes of it


class FlashAttention(NamedTuple):
    """A FlashAttention that runs here.

    rows: (q, k, v, causal=True), [B, T, H, E] in and out; None where SDPA does it, on `torch_implementation`.
    documents: (q, k, v, starts, starts, T, T), [N, H, E] in and out; None where torch's varlen_attn does it.
    operators: those that compute the forward pass.
    """

    package: str
    reason: str
    operators: tuple[str, ...]
    rows: Callable[..., Any] | None = None
    documents: Callable[..., Any] | None = None
    torch_implementation: str | None = None


def prefers_cudnn(
    capability: tuple[int, int], cudnn_version: int, *, dropout: float, head_width: int | None
) -> bool:  # fmt: skip
    """Whether SDPA is fastest on cuDNN: on Hopper and data-centre Blackwell (as in ATen's cuda/sdp_utils.cpp).

    Not for a model of transformers (head_width None), which calls SDPA in its own way, nor with dropout, of which cuDNN
    knows sixteenths only. Wider heads than 128 it takes from later versions on.
    """
    if capability[0] not in (9, 10) or cudnn_version < MIN_CUDNN:
        return False
    return not dropout and head_width is not None and head_width % 8 == 0 and head_width <= 128


def rank_attention_kernels(
    capability: tuple[int, int], cudnn_version: int, *, dropout: float, head_width: int | None, document_mask: bool
) -> list[str]:
    """The packages that can run on such a GPU, and CUDNN, fastest first; installed or not.

    cuDNN takes no places of documents in SDPA: with a document mask it is in no list.
    """
    major = capability[0]
    width = 64 if head_width is None else head_width
    takes_width = width % 8 == 0 and not dropout  # versions 3 and 4 have no dropout
    flash4_width = 256 if major == 9 else 128
    ranked: list[str] = []
    if major == 9 and takes_width and width <= 256:
        ranked.append(FLASH3)
    if major in (9, 10, 11) and takes_width and width <= flash4_width:
        ranked.append(FLASH4)
    if not document_mask and prefers_cudnn(capability, cudnn_version, dropout=dropout, head_width=head_width):
        ranked.append(CUDNN)
    if major >= 8 and width <= 256:
        ranked.append(FLASH2)
    if major == 12 and takes_width and width <= flash4_width:
        ranked.append(FLASH4)
    return ranked


def find_flash_attention(
    packages: Sequence[str], device: torch.device, dtype: torch.dtype, *, head_width: int | None, document_mask: bool
) -> tuple[FlashAttention | None, str]:
    """(The first of these packages that is installed and computes attention right on this device or None, the reason).

    A package that is there and cannot be used is named in the reason.
    """
    useless: list[str] = []
    for package in packages:
        try:
            flash = load_flash_attention(package, in_sdpa=head_width is not None)
        except ImportError:  # not installed, or built for another torch
            continue
        except ValueError as error:
            useless.append(f"{TITLES[package]} is installed, but {error}")
            continue
        wrong = try_flash_attention(flash, device, dtype, head_width or 64, document_mask)
        if wrong is None:
            generation = ARCHITECTURES[torch.cuda.get_device_capability(device)[0]]
            on_device = "" if package == FLASH2 else f" and the device is {generation} GPU"
            return flash, "; ".join([*useless, f"{flash.reason}{on_device}"])
        useless.append(f"{TITLES[package]} is installed, but {wrong}")
    if useless:
        return None, "; ".join(useless)
    what = "flash-attn (extra flash)" if FLASH2 in packages else " or ".join(TITLES[name] for name in packages)
    return None, f"{what} is not installed, or not for this torch"


def load_flash_attention(package: str, *, in_sdpa: bool) -> FlashAttention:
    """The functions of a package; or, if they do not fit and `in_sdpa`, torch's operators with the package behind them.

    Errors: ImportError without the package, ValueError where it cannot be used.
    """
    module = importlib.import_module(package)
    installed = f"{TITLES[package]} is installed"
    if not hasattr(module, "flash_attn_func") or not hasattr(module, "flash_attn_varlen_func"):
        raise ImportError(f"{package} has no attention")  # a folder of that name
    operators = FLASH_OPERATORS[package]
    if package == FLASH4:
        wrong = why_operators_do_not_fit()
        rows: Callable[..., Any] = flash4_attention
        documents: Callable[..., Any] = flash4_varlen_attention
    else:
        wrong = None if all(has_operator(name) for name in operators) else "it is no operator of torch"
        rows = module.flash_attn_func
        documents = by_keywords(module.flash_attn_varlen_func)
    implementation = TORCH_IMPLEMENTATIONS.get(package)
    if wrong is None or package == FLASH2:  # releases of version 2 before 2.7 are functions alone, and run
        return FlashAttention(package, installed, operators, rows, documents)
    if not in_sdpa or implementation not in list_torch_implementations():
        raise ValueError(wrong)
    activate_in_torch(implementation)
    kept = ("aten::_scaled_dot_product_flash_attention", "torch_attn::_varlen_attn")
    return FlashAttention(package, f"{installed}, behind torch's SDPA", kept, torch_implementation=implementation)


def has_operator(name: str) -> bool:
    """Whether torch's dispatcher knows this operator, "namespace::name"."""
    namespace, operator = name.split("::")
    return hasattr(getattr(torch.ops, namespace), operator)


def by_keywords(varlen: Callable[..., Any]) -> Callable[..., Any]:
    """flash_attn_varlen_func of version 2 or 3 as `FlashAttention.documents`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, T: int, S: int, **options: Any) -> Any:
        return varlen(
            q, k, v, cu_seqlens_q=starts, cu_seqlens_k=ends, max_seqlen_q=T, max_seqlen_k=S, causal=True, **options
        )

    return attend


def list_torch_implementations() -> list[str]:
    """The FlashAttentions that this torch can use in the place of its own."""
    list_them = getattr(torch.nn.attention, "list_flash_attention_impls", None)
    return [] if list_them is None else list_them()


def activate_in_torch(implementation: str) -> None:
    """From now on SDPA and varlen_attn of this process run on it. Errors: ValueError where torch cannot."""
    try:
        torch.nn.attention.activate_flash_attention_impl(implementation)
    except (ImportError, RuntimeError) as error:
        raise ValueError(first_line(error)) from error


def try_flash_attention(
    flash: FlashAttention, device: torch.device, dtype: torch.dtype, head_width: int, document_mask: bool
) -> str | None:
    """Why `flash` cannot be used: what it raised or how wrong it was on one row, forward and backward; None if right.

    Versions 3 and 4 have had pre-releases only, which fit some torch and some GPU. No random numbers are drawn.
    """
    tokens = sum(TRIAL_LENGTHS)
    q, k, v = (_waves(tokens, heads, head_width, device, dtype, i) for i, heads in enumerate((2, 1, 1)))
    lengths = TRIAL_LENGTHS if document_mask and flash.documents is not None else (tokens,)
    try:
        ours = _gradients(_run_trial(flash, q, k, v, lengths), (q, k, v))
    except Exception as error:  # a compiler's, a launch's: what a kernel that does not fit raises is not known
        return f"fails here: {type(error).__name__}: {first_line(error)}"
    q32, k32, v32 = (x.detach().float().requires_grad_() for x in (q, k, v))
    reference = _gradients(_define_attention(q32, k32, v32, lengths), (q32, k32, v32))
    errors = [(x.float() - y).norm() / y.norm() for x, y in zip(ours, reference, strict=True)]
    worst = float(torch.stack(errors).max())
    return None if worst <= MAX_TRIAL_ERROR else f"it is off by {worst:.1%} here"


def _waves(tokens: int, heads: int, width: int, device: torch.device, dtype: torch.dtype, phase: int) -> Tensor:
    """[tokens, heads, width], numbers in -1..1 that look random and are not."""
    places = torch.arange(tokens * heads * width, device=device, dtype=torch.float32)
    return (places * (1.7 + phase)).sin().view(tokens, heads, width).to(dtype).requires_grad_()


def _run_trial(flash: FlashAttention, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, lengths: tuple[int, ...]) -> Tensor:
    if len(lengths) > 1:
        assert flash.documents is not None
        starts = torch.tensor([0, *lengths], device=q_NHE.device).cumsum(0).int()
        longest = q_NHE.size(0)  # as it is called: the length of a row
        out = flash.documents(q_NHE, k_NKE, v_NKE, starts, starts, longest, longest)
    elif flash.rows is not None:
        out = flash.rows(q_NHE[None], k_NKE[None], v_NKE[None], causal=True)
    else:
        q, k, v = (x[None].transpose(1, 2) for x in (q_NHE, k_NKE, v_NKE))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(q_NHE.shape)


def _define_attention(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attention by its definition, document by document."""
    parts = []
    for q, k, v in zip(q_NHE.split(lengths), k_NKE.split(lengths), v_NKE.split(lengths), strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            q_HTE, k_KTE, v_KTE = (x[None].transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q_HTE, k_KTE, v_KTE, is_causal=True, enable_gqa=True)
        parts.append(out.transpose(1, 2)[0])
    return torch.cat(parts)


def _gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and what the sum of its squares makes of the inputs."""
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]
