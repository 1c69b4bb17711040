"""FlashAttention 4 without a GPU: the package compiles the kernels that our operators call, for a GPU of some kind.

A program, started by test_without_a_gpu.py with the kind of GPU (`sm_90`). Under fake tensors the package compiles and
launches nothing, which shows that it takes our arguments, and that what it returns is as our operators say.
"""

import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from smoltrain.kernels import flash_attention_4
from smoltrain.kernels.flash_attention_4 import FLASH4_MODULE, why_operators_do_not_fit

ROWS, TOKENS, HEADS, KEY_HEADS, WIDTH = 2, 256, 9, 3, 64


def make_heads(num: int, *, as_documents: bool) -> Tensor:
    """Heads as a decoder has them: side by side in memory, or after RoPE one after the other."""
    heads = torch.empty(ROWS, num, TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    return heads.flatten(0, 1) if as_documents else heads


def describe(tensors: tuple[Tensor, ...]) -> list[str]:
    """Shapes, strides and dtypes."""
    return [f"{list(x.shape)} {x.stride()} {x.dtype}" for x in tensors]


def compile_all() -> None:
    """Forward and backward, of rows and of documents; through the package, and through our operators' fakes."""
    missing = why_operators_do_not_fit()
    assert missing is None, missing
    operators = torch.ops.smoltrain
    for as_documents in (False, True):
        starts = torch.empty(17, dtype=torch.int32, device="cuda") if as_documents else None
        q, k, v = (make_heads(num, as_documents=as_documents) for num in (HEADS, KEY_HEADS, KEY_HEADS))
        inputs = (q, k, v, starts, TOKENS)
        theirs = flash_attention_4._forward(*inputs)
        ours = operators.flash_attention_4(*inputs)
        assert describe(theirs) == describe(ours), f"{describe(theirs)}, not {describe(ours)}"
        given: Any = (torch.empty_like(ours[0]), q, k, v, *ours, starts, TOKENS)
        theirs = flash_attention_4._backward(*given)
        ours = operators.flash_attention_4_backward(*given)
        assert describe(theirs) == describe(ours), f"{describe(theirs)}, not {describe(ours)}"
        print(f"{sys.argv[1]}, documents {as_documents}: compiled", flush=True)


if __name__ == "__main__":
    os.environ["FLASH_ATTENTION_ARCH"] = sys.argv[1]
    os.environ["CUTE_DSL_ARCH"] = f"{sys.argv[1]}a"
    os.environ["FLASH_ATTENTION_NUM_SMS"] = "132"
    importlib.import_module(FLASH4_MODULE)
    with FakeTensorMode():
        compile_all()
