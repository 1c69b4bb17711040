"""Liger's Triton kernels without a GPU: compiled to machine code of several GPUs, and interpreted on a CPU in fp32.

A program, started by test_without_a_gpu.py: `compile`, or `interpret` with TRITON_INTERPRET=1 (in bf16 the interpreter
truncates, so that there its numbers say nothing). It needs liger-kernel and triton, whose wheels bring `ptxas`.
"""

import importlib
import sys
from typing import Any

import torch

from smoltrain.kernels import loss as losses

COMPUTE_CAPABILITIES = (80, 89, 90, 100, 120)
VOCABULARY = 49_152
WIDTH = 576
# Of what our call passes: 32768 is Liger's largest block, and the next power of two above WIDTH is 1024.
CROSS_ENTROPY: dict[str, Any] = {
    "X_ptr": "*bf16", "X_stride": "i32", "Y_ptr": "*i64", "Y_stride": "i32", "loss_ptr": "*fp32", "loss_stride": "i32",
    "n_cols": "i32", "n_non_ignore": "i32", "sum_non_ignore_weight": "i32", "weight_sum": "fp32",
    "token_accuracy_stride": "i32", "predicted_tokens_stride": "i32", "ignore_index": "i32",
}  # fmt: skip
CROSS_ENTROPY_CONSTANTS: dict[str, Any] = {
    "weight_ptr": None, "z_loss_ptr": None, "token_accuracy_ptr": None, "predicted_tokens_ptr": None, "softcap": None,
    "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "sum", "RETURN_Z_LOSS": False,
    "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "BLOCK_SIZE": 32_768, "HAS_WEIGHT": False,
    "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True,
}  # fmt: skip
SCALE = {"X_ptr": "*bf16", "X_stride": "i32", "grad_output_ptr": "*fp32", "n_cols": "i32"}
SCALE_CONSTANTS: dict[str, Any] = {"BLOCK_SIZE": 1024, "X_col_stride": 1}


def compile_all() -> None:
    """Both kernels of the loss, for each GPU. ptxas is what a GPU's driver would refuse code by."""
    cross_entropy = importlib.import_module("liger_kernel.ops.cross_entropy").liger_cross_entropy_kernel
    scale = importlib.import_module("liger_kernel.ops.utils").element_mul_kernel
    kernels = ((cross_entropy, CROSS_ENTROPY, CROSS_ENTROPY_CONSTANTS), (scale, SCALE, SCALE_CONSTANTS))
    for capability in COMPUTE_CAPABILITIES:
        for kernel, types, constants in kernels:
            code = compile_kernel(kernel, types, constants, capability)
            print(f"{kernel.__name__} for sm_{capability}: {len(code)} bytes", flush=True)


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> bytes:
    """Machine code for a GPU that is not here."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    backends = importlib.import_module("triton.backends.compiler")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert {name for name, kind in signature.items() if kind == "constexpr"} == set(constants), "another release"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = compiler.ASTSource(kernel, signature, places)
    compiled = triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options={"num_warps": 32})
    return compiled.asm["cubin"]


def interpret() -> None:
    """The whole loss as we call it, against the plain one; with numbers so large that a wrong softmax would show."""
    torch.manual_seed(0)
    hidden = torch.randn(96, 64).requires_grad_()
    weight = (torch.randn(1000, 64) * 0.3).requires_grad_()
    labels = torch.randint(1000, (96,))
    labels[::50] = losses.IGNORE_INDEX
    liger, reason = losses._import_liger()
    assert liger is not None, reason
    results = []
    for kernel in (losses.LossKernel("liger", reason, liger=liger), losses.PLAIN_LOSS):
        value = losses.summed_cross_entropy(hidden, weight, labels, kernel)
        results.append([value.detach(), *torch.autograd.grad(value * 0.37, (hidden, weight))])
    for ours, truth in zip(*results, strict=True):
        error = float((ours - truth).norm() / truth.norm())
        assert error < 1e-5, f"off by {error:.1e}"
        print(f"off by {error:.1e}", flush=True)


if __name__ == "__main__":
    {"compile": compile_all, "interpret": interpret}[sys.argv[1]]()
