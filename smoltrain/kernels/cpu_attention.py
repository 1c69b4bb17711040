"""Causal self-attention for a CPU: batched matrix products over blocks of queries, and its backward pass written out.

torch's flash kernel for CPUs multiplies in loops of its own, far from the speed of a plain matmul. Here a block of
queries meets all keys up to its end in one batched matmul, then one softmax over its rows, then another matmul. All of
them are torch's own and fast as they are; nothing is compiled.

The scores exist in the dtype of the inputs, where SDPA keeps them in fp32: in bf16 a score of 16 is off by 0.03, and so
are the weights that come of it. So the product is taken twice, the second time less the row's largest score, subtracted
before the rounding: what counts in the softmax is close to 0 then, and exact. It costs a tenth of the time.

Query heads that share a key-value head (GQA, Ainslie et al. 2023) are stacked as rows of one matrix: keys and values
are not copied, and their gradients come out summed over these heads.

Legend: B batch, T tokens, H query heads, K key-value heads, E width per head, N = B * K, R rows of a block (its queries
in each of the H / K heads), S keys that the block may see.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from smoltrain.kernels.cpu_dropout import drop_threshold, dropout_scale, random_levels

QUERIES_PER_BLOCK = 128  # of 64, 128, 256 none was faster on two cores of an AMD EPYC (Zen 4)
# Longest row (T) whose attention weights stay in memory for the backward pass, H * (T + QUERIES_PER_BLOCK) / 2 of them
# per token; of longer rows they are computed again there, which takes 1.25 times as long. At T 1024 they are about half
# of what else a block of SmolLM2-135M keeps in bf16 (10 of 23 KiB per token), and they grow with T. The one owner of
# this number: estimate/ reads it here.
MAX_KEPT_LENGTH = 1024


def why_blocked_cannot_run() -> str | None:
    """Why this torch cannot compute the backward pass; None if it can."""
    if _find_softmax_backward() is None:
        return "this torch has no operator aten::_softmax_backward_data.out, which blocked needs"
    return None


def _find_softmax_backward() -> Callable[..., Tensor] | None:
    """torch's own backward of a softmax, which can write over what it reads; its name is private."""
    operator = getattr(torch.ops.aten, "_softmax_backward_data", None)
    return getattr(operator, "out", None)


def blocked_attention(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, *, dropout: float = 0.0, mask_B1TT: Tensor | None = None
) -> Tensor:
    """Causal attention of T tokens to themselves, [B, H, T, E] in the memory order of [B, T, H, E]; K divides H.

    `mask_B1TT` is added to the scores and must itself be causal (-inf for later keys). `dropout` of the weights is a
    function of torch's random state, of which one number is drawn; gradient checkpointing restores that state.
    """
    assert q_BHTE.size(2) == k_BKTE.size(2), "the queries are those of a cache"
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHTE, k_BKTE, v_BKTE))
    seed = torch.randint(1 << 62, ()) if dropout else None
    keep = trains and q_BHTE.size(2) <= MAX_KEPT_LENGTH
    return _blocked_forward(q_BHTE, k_BKTE, v_BKTE, mask_B1TT, seed, dropout, keep)[0]


# Operators of torch, which torch.compile takes as they stand instead of unrolling all blocks.
@torch.library.custom_op("smoltrain::blocked_attention", mutates_args=())
def _blocked_forward(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask_B1TT: Tensor | None,
    seed: Tensor | None, dropout: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """O = softmax(Q K^T / sqrt(E)) V, a block of queries at a time.

    Returns (output, the weights of all blocks laid end to end; or with `keep` False an empty tensor).
    """
    B, H, T, E = q_BHTE.shape
    k_NTE = k_BKTE.reshape(-1, T, E)
    v_NTE = v_BKTE.reshape(-1, T, E)
    weight_dropout = _WeightDropout(dropout, seed)
    out_BHTE, kept = _allocate_outputs(q_BHTE, keep)
    for block, span in _query_blocks(q_BHTE):
        buffer = kept[span] if keep else kept.new_empty(span.stop - span.start)
        p_NRS = weight_dropout.mark_dropped(_attention_weights(q_BHTE, k_NTE, block, mask_B1TT, buffer))
        out_NRE = torch.bmm(weight_dropout.zero_dropped(p_NRS), v_NTE[:, : block.stop])
        out_BHTE[:, :, block] = out_NRE.view(B, H, -1, E)
    if dropout:
        out_BHTE *= weight_dropout.scale
    return out_BHTE, kept


@torch.library.custom_op("smoltrain::blocked_attention_backward", mutates_args=())
def _blocked_backward(
    dout_BHTE: Tensor, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask_B1TT: Tensor | None,
    seed: Tensor | None, kept: Tensor, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With P the weights, O = P V and dP = dO V^T: dV = P^T dO and dS = P * (dP - the sum of P * dP).

    S are the scaled scores, so dQ = dS K / sqrt(E) and dK = dS^T Q / sqrt(E).
    """
    B, H, T, E = q_BHTE.shape
    k_NTE = k_BKTE.reshape(-1, T, E)
    v_NTE = v_BKTE.reshape(-1, T, E)
    N = len(k_NTE)
    weight_dropout = _WeightDropout(dropout, seed)
    softmax_backward = _find_softmax_backward()
    assert softmax_backward is not None, "choose_attention_kernel does not take blocked then"
    dq_BHTE = torch.empty_like(q_BHTE)
    # Many blocks add to the gradients of a key, too many for bf16.
    sum_dtype = torch.promote_types(k_NTE.dtype, torch.float32)
    dk_NTE = torch.zeros_like(k_NTE, dtype=sum_dtype)
    dv_NTE = torch.zeros_like(v_NTE, dtype=sum_dtype)
    for block, span in _query_blocks(q_BHTE):
        q_NRE = _stack_query_heads(q_BHTE, block, N)
        dout_NRE = _stack_query_heads(dout_BHTE, block, N)
        keys = slice(0, block.stop)
        if len(kept):
            p_NRS = kept[span].view(N, -1, block.stop)
        else:
            buffer = kept.new_empty(span.stop - span.start)
            p_NRS = weight_dropout.mark_dropped(_attention_weights(q_BHTE, k_NTE, block, mask_B1TT, buffer))
        # Converted first and added then: see fp32_sums.py.
        dv_NTE[:, keys] += torch.bmm(weight_dropout.zero_dropped(p_NRS).mT, dout_NRE).to(sum_dtype)
        dp_NRS = weight_dropout.mask_gradient(torch.bmm(dout_NRE, v_NTE[:, keys].mT), p_NRS)
        p_NRS = p_NRS.abs() if dropout else p_NRS
        # Row by row, so it may write over what it reads.
        ds_NRS = softmax_backward(dp_NRS, p_NRS, -1, p_NRS.dtype, grad_input=dp_NRS)
        dq_BHTE[:, :, block] = torch.bmm(ds_NRS, k_NTE[:, keys]).view(B, H, -1, E)
        dk_NTE[:, keys] += torch.bmm(ds_NRS.mT, q_NRE).to(sum_dtype)
    dq_BHTE *= _softmax_scale(E) * weight_dropout.scale
    dk_NTE *= _softmax_scale(E) * weight_dropout.scale
    dv_NTE *= weight_dropout.scale
    return dq_BHTE, dk_NTE.to(k_NTE.dtype).view(B, -1, T, E), dv_NTE.to(k_NTE.dtype).view(B, -1, T, E)


def _allocate_outputs(q_BHTE: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """What `_blocked_forward` returns, not filled in; the heads lie side by side, as the next projection wants them."""
    B, H, T, E = q_BHTE.shape
    num_kept = max(span.stop for _, span in _query_blocks(q_BHTE)) if keep else 0
    return q_BHTE.new_empty(B, T, H, E).transpose(1, 2), q_BHTE.new_empty(num_kept)


@_blocked_forward.register_fake
def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, seed: Any, dropout: float, keep: bool
) -> tuple[Tensor, Tensor]:
    del k, v, mask, seed, dropout  # of the operator's signature; only shapes are asked for
    return _allocate_outputs(q, keep)


@_blocked_backward.register_fake
def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _autograd_backward(ctx: Any, dout_BHTE: Tensor, _: Any) -> tuple[Any, ...]:
    return (*_blocked_backward(dout_BHTE, *ctx.saved_tensors, ctx.dropout), None, None, None, None)


_blocked_forward.register_autograd(_autograd_backward, setup_context=_save_for_backward)
BLOCKED_ATTENTION = torch.ops.smoltrain.blocked_attention.default


def _query_blocks(q_BHTE: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of each block: (its queries, where its weights lie when those of all blocks are laid end to end)."""
    B, H, T, _ = q_BHTE.shape
    end = 0
    for start in range(0, T, QUERIES_PER_BLOCK):
        stop = min(start + QUERIES_PER_BLOCK, T)
        begin = end
        end = begin + B * H * (stop - start) * stop
        yield slice(start, stop), slice(begin, end)


def _softmax_scale(E: int) -> float:
    return 1 / math.sqrt(E)


def _stack_query_heads(x_BHTE: Tensor, block: slice, N: int) -> Tensor:
    """The block's rows of all heads that share a key-value head, one below the other: [N, R, E]."""
    return x_BHTE[:, :, block].reshape(N, -1, x_BHTE.size(-1))


def _attention_weights(q_BHTE: Tensor, k_NTE: Tensor, block: slice, mask_B1TT: Tensor | None, buffer: Tensor) -> Tensor:
    """The attention weights of a block before dropout, [N, R, S], written into `buffer`."""
    B, H, _, E = q_BHTE.shape
    scale = _softmax_scale(E)
    q_NRE = _stack_query_heads(q_BHTE, block, len(k_NTE))
    k_NES = k_NTE[:, : block.stop].mT
    s_NRS = buffer.view(len(k_NTE), -1, block.stop)
    torch.baddbmm(s_NRS, q_NRE, k_NES, beta=0, alpha=scale, out=s_NRS)  # scaled before it is rounded
    s_BHQS = s_NRS.view(B, H, -1, block.stop)
    if mask_B1TT is not None:
        masked_BHQS = s_BHQS
        unseen = mask_B1TT[:, :, block, : block.stop]
    else:  # all queries of the block see the keys of earlier blocks
        masked_BHQS = s_BHQS[..., block]
        unseen = _causal_mask(s_BHQS.size(2), s_BHQS.dtype)
    masked_BHQS += unseen
    if s_NRS.dtype.itemsize < 4:  # the second product, less the largest score: see the top of this file
        largest_NR1 = s_NRS.amax(-1, keepdim=True)
        torch.baddbmm(largest_NR1, q_NRE, k_NES, beta=-1, alpha=scale, out=s_NRS)
        masked_BHQS += unseen
    return torch.softmax(s_NRS, -1, out=s_NRS)


@functools.lru_cache(maxsize=8)
def _causal_mask(Q: int, dtype: torch.dtype) -> Tensor:
    """-inf for the keys that come after a query, [Q, Q]. Made once: torch takes longer for it than for a softmax."""
    return torch.full((Q, Q), float("-inf"), dtype=dtype).triu(1)


class _WeightDropout:
    """Dropout of the attention weights, block after block; the same ones for the same seed.

    A dropped weight is kept with the opposite sign, for the gradient of the softmax needs its value.
    """

    def __init__(self, rate: float, seed: Tensor | None) -> None:
        self.threshold = drop_threshold(rate)
        self.scale = dropout_scale(rate)
        self.generator = None if seed is None else torch.Generator().manual_seed(int(seed))

    def mark_dropped(self, p_NRS: Tensor) -> Tensor:
        """The block's weights, a minus before those that are dropped now."""
        if self.generator is None:
            return p_NRS
        return p_NRS.copysign_(random_levels(p_NRS.shape, self.generator) - self.threshold)

    def zero_dropped(self, p_NRS: Tensor) -> Tensor:
        """The weights, zero where they are dropped; the caller multiplies its result by `scale`."""
        return p_NRS if self.generator is None else p_NRS.relu()

    def mask_gradient(self, dp_NRS: Tensor, p_NRS: Tensor) -> Tensor:
        """The gradient of the weights before dropout, but for `scale`."""
        return dp_NRS if self.generator is None else dp_NRS.masked_fill_(p_NRS <= 0, 0)
