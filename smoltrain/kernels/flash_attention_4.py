"""FlashAttention 4 (the package flash-attn-4, `flash_attn.cute`) as two operators of torch.

The package's own functions are Python that compiles kernels while it runs: torch.compile cannot look through them, and
selective gradient checkpointing sees no operator whose output it could keep. As operators both know them by name.
They call what torch's own use of FlashAttention 4 calls (torch/nn/attention/_fa4.py, torch 2.13), all by keywords: the
order of the arguments is another than in versions 2 and 3. Release 4.0.0b36 was read, and compiled for sm_90, 100 and
120 (tests/kernels/flash4_ahead.py).

Legend: B batch, T tokens, H query heads, K key-value heads, E width per head, N tokens of all rows laid end to end.
"""

import importlib
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

FLASH4_MODULE = "flash_attn.cute.interface"
FLASH4_OPERATOR = "smoltrain::flash_attention_4"
SHARED_ARGUMENTS = {"causal", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
FORWARD_ARGUMENTS = {"q", "k", "v", "return_lse"} | SHARED_ARGUMENTS
BACKWARD_ARGUMENTS = {"q", "k", "v", "out", "dout", "lse", "deterministic"} | SHARED_ARGUMENTS


def why_operators_do_not_fit() -> str | None:
    """What the installed flash-attn-4 lacks of what is called here; None if nothing. Errors: ImportError."""
    interface = importlib.import_module(FLASH4_MODULE)
    for name, arguments in (("_flash_attn_fwd", FORWARD_ARGUMENTS), ("_flash_attn_bwd", BACKWARD_ARGUMENTS)):
        function = getattr(interface, name, None)
        if function is None:
            return f"its {name} is missing"
        missing = arguments - set(inspect.signature(function).parameters)
        if missing:
            return f"its {name} takes no {', '.join(sorted(missing))}"
    return None


def flash4_attention(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, *, causal: bool) -> Tensor:
    """Causal attention over whole rows, [B, T, H, E], the mask aligned to the bottom right."""
    assert causal
    return torch.ops.smoltrain.flash_attention_4(q_BTHE, k_BTKE, v_BTKE, None, 0)[0]


def flash4_varlen_attention(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """Causal attention within each document, [N, H, E]; queries and keys are of the same documents."""
    assert starts_q is starts_k
    assert longest_q == longest_k
    return torch.ops.smoltrain.flash_attention_4(q_NHE, k_NKE, v_NKE, starts_q, longest_q)[0]


def _document_arguments(starts: Tensor | None, longest: int) -> dict[str, Any]:
    if starts is None:
        return {}
    return {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp); without `starts` of rows [B, T, H, E], with them of documents [N, H, E]."""
    interface = importlib.import_module(FLASH4_MODULE)
    documents = _document_arguments(starts, longest)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # of its compiler, about its own code
        results = interface._flash_attn_fwd(q=q, k=k, v=v, causal=True, return_lse=True, **documents)
    return results[0], results[1]  # in newer releases there are two more


_flash_attention_4 = torch.library.custom_op(FLASH4_OPERATOR, _forward, mutates_args=())


@_flash_attention_4.register_fake
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, starts: Any, longest: int) -> tuple[Tensor, Tensor]:
    del k, v, starts, longest  # of the operator's signature; only shapes are asked for
    rows_first = q.movedim(-2, -3)  # heads before tokens, as the log-sum-exp has them
    return q.new_empty(q.shape), q.new_empty(rows_first.shape[:-1], dtype=torch.float32)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    interface = importlib.import_module(FLASH4_MODULE)
    documents = _document_arguments(starts, longest)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
        results = interface._flash_attn_bwd(
            q=q, k=k, v=v, out=out, dout=dout, lse=lse, causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(), **documents,
        )  # fmt: skip
    return results[0], results[1], results[2]


_flash_attention_4_backward = torch.library.custom_op(f"{FLASH4_OPERATOR}_backward", _backward, mutates_args=())


@_flash_attention_4_backward.register_fake
def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)  # with these strides, as the package does


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, longest = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.longest = longest


def _differentiate(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, starts = ctx.saved_tensors
    backward = torch.ops.smoltrain.flash_attention_4_backward
    gradients = backward(dout, q, k, v, out, lse, starts, ctx.longest)
    return (*gradients, None, None)


_flash_attention_4.register_autograd(_differentiate, setup_context=_keep_for_backward)
