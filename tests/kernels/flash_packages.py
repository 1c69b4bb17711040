"""Stand-ins for the packages of FlashAttention, and for the GPU that they run on."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smoltrain.kernels import flash_attention

PACKAGES = ("flash_attn", "flash_attn_interface", "flash_attn.cute")


def pretend_gpu(
    patch: pytest.MonkeyPatch, capability: tuple[int, int], *packages: str, cudnn: int = 91900, tried: Any = None
) -> None:
    """A GPU of this compute capability, this cuDNN, and these packages and no others, which run there."""
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    patch.setattr(flash_attention, "has_operator", lambda name: True)
    patch.setattr(flash_attention, "try_flash_attention", tried or (lambda *args: None))
    for package in PACKAGES:
        functions = {
            "flash_attn_func": package,
            "flash_attn_varlen_func": lambda *args, package=package, **options: (package, options),
        }
        module = SimpleNamespace(**functions) if package in packages else None  # None: ImportError
        patch.setitem(sys.modules, package, module)
    interface = FakeInterface() if "flash_attn.cute" in packages else None
    patch.setitem(sys.modules, "flash_attn.cute.interface", interface)


class FakeInterface(ModuleType):
    """flash_attn.cute.interface on a CPU: the same names of arguments, by the definition; it counts its calls."""

    def __init__(self) -> None:
        super().__init__("flash_attn.cute.interface")
        self.calls: list[str] = []

    def _flash_attn_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None, max_seqlen_k: Any = None, causal: bool = False, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        assert qv is None
        assert causal
        assert return_lse
        self._check_documents(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        self.calls.append("forward")
        tokens_last = q.movedim(-2, -3).shape[:-1]
        return self._attend(q, k, v, cu_seqlens_q).contiguous(), q.new_ones(tokens_last, dtype=torch.float32), None, 0

    def _flash_attn_bwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: Any = None,
        causal: bool = False, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
        max_seqlen_k: Any = None, deterministic: bool = False,
    ) -> Any:  # fmt: skip
        assert causal
        assert not deterministic
        assert softmax_scale is None
        assert out.shape == dout.shape == q.shape
        assert bool((lse == 1).all()), "the log-sum-exp of the forward pass"
        self._check_documents(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        self.calls.append("backward")
        gradients = differentiate(q, k, v, dout, cu_seqlens_q)
        return tuple(torch.empty_like(x).copy_(y) for x, y in zip((q, k, v), gradients, strict=True))

    @staticmethod
    def _check_documents(starts_q: Any, starts_k: Any, longest_q: Any, longest_k: Any) -> None:
        assert (starts_q is None) == (starts_k is None) == (longest_q is None) == (longest_k is None)
        if starts_q is not None:
            assert starts_q.dtype == torch.int32
            assert torch.equal(starts_q, starts_k)
            assert longest_q == longest_k >= int(starts_q.diff().max())

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
        if starts is None:
            T, S = q.size(1), k.size(1)
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
            return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        lengths = starts.diff().tolist()
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([FakeInterface._attend(x[None], y[None], z[None], None)[0] for x, y, z in parts])


def differentiate(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, starts: Tensor | None) -> list[Tensor]:
    """The gradients by their formulas, as inside of an operator torch records nothing: see cpu_attention.py."""
    if starts is not None:
        lengths = starts.diff().tolist()
        documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), dout.split(lengths), strict=True)
        parts = [differentiate(a[None], b[None], c[None], d[None], None) for a, b, c, d in documents]
        return [torch.cat([part[i][0] for part in parts]) for i in range(3)]
    groups = q.size(2) // k.size(2)
    q, dout = q.transpose(1, 2), dout.transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
    T, S, scale = q.size(2), k.size(2), q.size(3) ** -0.5
    unseen = torch.ones(T, S, dtype=torch.bool).tril(S - T).logical_not()
    weights = (q @ k.mT * scale).masked_fill(unseen, float("-inf")).softmax(-1)
    dweights = dout @ v.mT
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dscores.mT @ q, weights.mT @ dout))
    return [x.transpose(1, 2) for x in (dscores @ k, dk, dv)]
