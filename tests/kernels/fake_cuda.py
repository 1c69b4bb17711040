"""The decoder, forward and backward, on FAKE CUDA tensors: shapes, dtypes, devices and operators, but no numbers.

A program for a torch that is built for CUDA, on a machine without a GPU: test_without_a_gpu.py starts it. What it shows
for each kernel, loss and way of gradient checkpointing: the loss and all gradients are on the GPU in their dtypes; no
operator touches host memory of more than one element; the host never waits for a number; attention runs as the
operator that was chosen, and under `selective` once.
"""

import inspect
import itertools
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smoltrain.config.schema import ModelSection
from smoltrain.kernels import loss as losses
from smoltrain.kernels.attention import AttentionKernel, choose_attention_kernel
from smoltrain.model.decoder import Decoder
from smoltrain.model.interface import ComputeOptions
from tests.kernels.flash_packages import pretend_gpu

CUDA = torch.device("cuda:0")
LAYERS = 2
SECTION = ModelSection(
    vocab_size=49_152, hidden_size=576, num_hidden_layers=LAYERS, num_attention_heads=9, num_key_value_heads=3,
    intermediate_size=1536, max_position_embeddings=2048,
)  # fmt: skip
# Compute capability and what is installed there -> the operator of attention for rows, and for documents.
GPUS: dict[str, tuple[tuple[int, int], tuple[str, ...], str, str]] = {
    "sm_80": ((8, 0), (), "aten._scaled_dot_product_flash_attention", "torch_attn._varlen_attn"),
    "sm_90": ((9, 0), (), "aten._scaled_dot_product_cudnn_attention", "torch_attn._varlen_attn"),
    "sm_100 with version 4": (
        (10, 0), ("flash_attn.cute",), "smoltrain.flash_attention_4", "smoltrain.flash_attention_4",
    ),
    "sm_120": ((12, 0), (), "aten._scaled_dot_product_flash_attention", "torch_attn._varlen_attn"),
}  # fmt: skip
LOSSES = {
    "plain": losses.PLAIN_LOSS,
    "fused": losses.LossKernel("fused", ""),
    "recomputed": losses.LossKernel("recomputed", ""),
}
MODES: tuple[Any, ...] = ("none", "selective", "full")
# Where nobody says how many documents there are, the host has to wait for their number.
MASKED = (False, True) if "num_documents" in inspect.signature(Decoder.forward).parameters else (False,)


class DeviceMix(TorchDispatchMode):
    """Refuses operators that touch host memory of more than one element, and those that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operator, if it is one for the device."""
        name = str(func).removesuffix(".default")
        if not name.startswith("prim."):  # questions for a device or a dtype
            self.counts[name] += 1
        assert "_local_scalar_dense" not in name, "the host waits for a number"
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                assert leaf.numel() <= 1, f"{name} touches {list(leaf.shape)} in host memory"
        return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *,
    is_causal: bool = False, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """SDPA, whose own choice would ask the device: the first backend that is allowed and takes a mask, or none."""
    assert enable_gqa == (q.size(1) != k.size(1))
    aten = torch.ops.aten
    backends = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    if attn_mask is not None:
        backends = [backend for backend in backends if backend == SDPBackend.EFFICIENT_ATTENTION]
    if backends[0] == SDPBackend.CUDNN_ATTENTION:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, dropout_p, is_causal)[0]
    if backends[0] == SDPBackend.FLASH_ATTENTION:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    assert backends[0] == SDPBackend.EFFICIENT_ATTENTION
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal)[0]


def run_backward(loss: Tensor) -> None:
    """loss.backward() without torch's engine, which asks the driver for a stream; node by node, from the loss down."""
    nodes = _sort_nodes(loss.grad_fn)
    gradients: dict[Any, dict[int, Tensor]] = {node: {} for node in nodes}
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in nodes:
        given = [gradients[node].get(i) for i in range(len(node._input_metadata))]
        if hasattr(node, "variable"):  # a leaf
            node.variable.grad = given[0] if node.variable.grad is None else node.variable.grad + given[0]
            continue
        results = node.apply(*given) if isinstance(node, BackwardCFunction) else node(*given)
        results = results if isinstance(results, tuple) else (results,)
        assert not any(isinstance(x, Tensor) for x in results[len(node.next_functions) :])  # of inputs like numbers
        for (following, i), result in zip(node.next_functions, results, strict=False):
            if following is not None and result is not None:
                wanted = following._input_metadata[i]  # torch's engine casts what comes in another dtype
                gradient = result.to(wanted.dtype).sum_to_size(wanted.shape)
                before = gradients[following].get(i)
                gradients[following][i] = gradient if before is None else before + gradient


def _sort_nodes(root: Any) -> list[Any]:
    """The nodes of the graph, each before those that get gradients from it."""
    done: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, followed = stack.pop()
        if followed:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions if following is not None)
    return done[::-1]


def make_model(mode: Any, kernel: AttentionKernel, loss: losses.LossKernel, z_loss: float) -> Decoder:
    """The decoder, its weights in bf16 on the fake device."""
    with torch.device("meta"):
        model = Decoder(SECTION, ComputeOptions(mode, kernel, loss, z_loss))
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=torch.bfloat16, device=CUDA)
                module._parameters[name] = torch.nn.Parameter(empty)
    return model


def run_case(kernel: AttentionKernel, loss: losses.LossKernel, mode: Any, masked: bool, z_loss: float) -> Counter[str]:
    """The operators of one forward and backward pass; what is wrong is raised."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        model = make_model(mode, kernel, loss, z_loss)
        ids = torch.zeros(4, 2048, dtype=torch.long, device=CUDA)
        options: dict[str, Any] = {"positions_BT": ids, "num_documents": 16} if masked else {}
        with DeviceMix() as mix:
            value = model(ids, ids, **options)
            assert (value.dtype, value.shape, value.device) == (torch.float32, (), CUDA)
            scaled = value * torch.full((), 0.5, device=CUDA)
            with torch.no_grad():
                run_backward(scaled)
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            same = (weight.grad.dtype, weight.grad.shape, weight.grad.device)
            assert same == (weight.dtype, weight.shape, weight.device), name
    return mix.counts


def run_all() -> None:
    """Each kernel x loss x gradient checkpointing x document mask."""
    patch = pytest.MonkeyPatch()
    patch.setattr(F, "scaled_dot_product_attention", attend)
    # Outside of torch's engine checkpointing would not know that one backward pass asks, and recompute for each node.
    patch.setattr(torch._C, "_current_graph_task_id", lambda: num_cases)
    num_cases = 0
    for gpu, (capability, packages, for_rows, for_documents) in GPUS.items():
        pretend_gpu(patch, capability, *packages)
        for masked, (loss_name, loss), mode in itertools.product(MASKED, LOSSES.items(), MODES):
            kernel = choose_attention_kernel("auto", CUDA, torch.bfloat16, head_width=64, document_mask=masked)
            z_loss = 1e-4 if loss_name == "fused" else 0.0
            counts = run_case(kernel, loss, mode, masked, z_loss)
            operator = for_documents if masked else for_rows
            times = LAYERS * (2 if mode == "full" else 1)
            case = f"{gpu}, {kernel.name}, documents {masked}, {loss_name}, {mode}"
            assert counts[operator] == times, f"{case}: {operator} ran {counts[operator]} times, not {times}"
            fp32_sums = counts["aten.addmm.dtype_out"]
            assert (fp32_sums > 0) == (loss_name == "fused"), f"{case}: {fp32_sums} products added in fp32"
            print(f"{case}: {counts.total()} operators", flush=True)
            num_cases += 1
    print(f"{num_cases} cases of torch {torch.__version__} are right", flush=True)


if __name__ == "__main__":
    assert torch.version.cuda, "a torch that is built for CUDA"
    sys.exit(run_all())
