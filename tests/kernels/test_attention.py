"""The kernels agree with the definition of causal attention, and the right one is chosen for the right reason."""

import functools
import inspect
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from smoltrain.config.schema import ModelSection
from smoltrain.errors import UserError
from smoltrain.kernels import attention
from smoltrain.kernels.attention import AttentionKernel, PackedDocuments, causal_attention, choose_attention_kernel
from smoltrain.model.build import build_model
from tests.kernels.flash_packages import pretend_gpu
from tests.models import build_with

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32


def qkv(queries: int, keys: int, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [2, 4, T, 8], k and v [2, K, S, 8] that want gradients."""
    g = torch.Generator().manual_seed(0)
    heads = [(4, queries), (kv_heads, keys), (kv_heads, keys)]
    q, k, v = (torch.randn(2, h, n, 8, generator=g).requires_grad_() for h, n in heads)
    return q, k, v


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(E)) v, query by query, over the keys that it may see."""
    groups, T, S = q.size(1) // k.size(1), q.size(2), k.size(2)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    rows = []
    for i in range(T):
        seen = S - T + i + 1
        weights = (k[:, :, :seen] @ q[:, :, i, :, None] / q.size(-1) ** 0.5).softmax(2)
        rows.append((weights * v[:, :, :seen]).sum(2))
    return torch.stack(rows, 2)


def fake_flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Tensor:
    """What flash_attn_func documents: [B, T, H, E] in and out, causal mask aligned to the bottom right."""
    assert causal
    assert dropout_p == 0.0
    return definition(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def assert_same_gradients(out: Tensor, want: Tensor, ours: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Two outputs, and what the sums of their squares make of the inputs of each, agree."""
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    out.square().sum().backward()
    want.square().sum().backward()
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5)


FLASH2 = AttentionKernel("flash-attn", "test", fake_flash)
FLASH3_BETA = AttentionKernel(
    "flash-attn", "test", lambda *args, **options: (fake_flash(*args, **options), "log-sum-exp")
)


@pytest.mark.parametrize(
    "kernel",
    [AttentionKernel("sdpa", ""), AttentionKernel("math", ""), AttentionKernel("blocked", ""), FLASH2, FLASH3_BETA],
    ids=["sdpa", "math", "blocked", "flash2", "flash3"],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (3, 7), (1, 7), (1, 1), (6, 7)])
def test_every_kernel_is_the_definition(kernel: AttentionKernel, kv_heads: int, queries: int, keys: int):
    ours, truth = qkv(queries, keys, kv_heads), qkv(queries, keys, kv_heads)
    out, want = causal_attention(*ours, kernel), definition(*truth)
    assert out.shape == (2, 4, queries, 8)
    assert_same_gradients(out, want, ours, truth)


@pytest.mark.parametrize(("name", "fused"), [("sdpa", True), ("math", False)])
def test_math_allows_no_fused_kernel(monkeypatch: pytest.MonkeyPatch, name: Any, fused: bool):
    allowed: list[bool] = []

    def spy(q: Tensor, *args: Any, **options: Any) -> Tensor:
        allowed.append(torch.backends.cuda.flash_sdp_enabled())  # the switch rules the CPU's kernels too
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    causal_attention(*qkv(6, 6), AttentionKernel(name, "test"))
    assert allowed == [fused]


@pytest.mark.parametrize("kernel", [FLASH2, AttentionKernel("blocked", "")], ids=["flash2", "blocked"])
def test_a_decoder_runs_on_other_kernels_as_on_sdpa(kernel: AttentionKernel):
    shape = ModelSection(
        vocab_size=31,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.1,
    )
    ours, sdpa = build_with(shape, attention=kernel), build_model(shape)
    ours.load_state_dict(sdpa.state_dict())
    ids = torch.arange(18).view(2, 9)
    torch.testing.assert_close(ours(ids), sdpa(ids), rtol=0, atol=1e-5)
    with torch.no_grad():
        cache = ours.new_cache(2, 9)
        pieces = [ours(piece, cache=cache) for piece in ids.split([4, 1, 4], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), sdpa(ids), rtol=0, atol=1e-5)


CUDNN_FIRST = AttentionKernel("sdpa", "", sdpa_first=SDPBackend.CUDNN_ATTENTION)


@pytest.mark.parametrize(
    ("kernel", "only_causal", "order"),
    [
        (CUDNN_FIRST, True, ["CUDNN", "FLASH", "EFFICIENT", "MATH"]),
        (CUDNN_FIRST, False, ["FLASH", "EFFICIENT", "MATH"]),  # never with a mask
        (AttentionKernel("math", ""), True, ["MATH"]),
    ],
)
def test_sdpa_asks_its_kernels_in_the_order_of_ours(kernel: AttentionKernel, only_causal: bool, order: list[str]):
    """The order is torch's own state, which a CPU keeps too."""
    before = torch._C._get_sdp_priority_order()
    with attention._sdpa_backends(kernel, CUDA, only_causal=only_causal):
        asked = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    assert [backend.name.removesuffix("_ATTENTION") for backend in asked] == order
    assert torch._C._get_sdp_priority_order()[:4] == before[:4]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_the_order_of_sdpa_is_part_of_a_compiled_graph():
    asked: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            return graph(*args)

        calls = [node for node in graph.graph.nodes if node.target is torch.nn.attention._sdpa_kernel]
        asked.extend([[str(b.args[0]) for b in node.args[0]] for node in calls])
        return run

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with attention._sdpa_backends(CUDNN_FIRST, CUDA, only_causal=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    inputs = qkv(6, 6)
    out = torch.compile(attend, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, attend(*inputs))
    assert asked[0] == ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]


def test_dropout_reaches_the_kernel():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        q, k, v = qkv(6, 6)
        plain = causal_attention(q, k, v, AttentionKernel("sdpa", ""))
        assert not torch.equal(causal_attention(q, k, v, AttentionKernel("sdpa", ""), dropout=0.5), plain)
    seen: dict[str, Any] = {}
    spy = AttentionKernel("flash-attn", "", lambda q, k, v, **options: seen.update(options) or q)
    causal_attention(q, k, v, spy, dropout=0.5)
    assert seen == {"causal": True, "dropout_p": 0.5}
    seen.clear()
    causal_attention(q, k, v, spy)
    assert seen == {"causal": True}  # FlashAttention 3 knows no dropout_p


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends to have a GPU of some compute capability, a cuDNN, and some packages that run on it, and no others."""
    return functools.partial(pretend_gpu, monkeypatch)


A100, H100, T4 = (8, 0), (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "dtype", "dropout", "head_width", "how"),
    [
        (H100, BF16, 0.0, 64, "torch's varlen_attn"),
        (A100, torch.float16, 0.0, 8, "torch's varlen_attn"),
        (A100, BF16, 0.1, 64, "a mask, as torch's varlen_attn has no dropout,"),
        (A100, BF16, 0.0, 36, "a mask, as torch's varlen_attn takes no heads 36 wide,"),
        (A100, BF16, 0.0, 200, "a mask, as torch's varlen_attn takes no heads 200 wide,"),
        (A100, BF16, 0.0, None, "a mask"),
        (A100, FP32, 0.0, 64, "a mask"),
        (T4, BF16, 0.0, 64, "a mask"),
    ],
)
def test_without_flash_attn_torch_keeps_documents_apart_where_it_can(
    *, install: Any, capability: tuple[int, int], dtype: torch.dtype, dropout: float, head_width: int | None, how: str
):
    install(capability)
    kernel = choose_attention_kernel("auto", CUDA, dtype, dropout=dropout, document_mask=True, head_width=head_width)
    assert kernel.name == "sdpa"
    assert kernel.reason.endswith(f"; {how} keeps documents apart")
    assert (kernel.varlen is not None) == (how == "torch's varlen_attn")
    assert choose_attention_kernel("auto", CUDA, dtype, dropout=dropout, head_width=head_width).varlen is None


@pytest.mark.parametrize(
    "torch_has", [None, lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal: None]
)
def test_a_torch_without_the_right_varlen_takes_a_mask(install: Any, monkeypatch: pytest.MonkeyPatch, torch_has: Any):
    install(A100)
    module = torch_has and SimpleNamespace(varlen_attn=torch_has)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    kernel = choose_attention_kernel("auto", CUDA, BF16, document_mask=True, head_width=64)
    assert kernel.varlen is None
    assert "a mask, as this torch has no causal varlen_attn," in kernel.reason


def of_torch_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any, *,
    scale: Any = None, window_size: Any = (-1, -1),
) -> None: ...  # fmt: skip


def of_torch_2_13(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any, *,
    window_size: Any = (-1, -1), enable_gqa: Any = False,
) -> None: ...  # fmt: skip


@pytest.mark.parametrize("real", ["installed", of_torch_2_11, of_torch_2_13])
def test_the_call_is_one_that_torchs_varlen_takes(install: Any, monkeypatch: pytest.MonkeyPatch, real: Any):
    install(A100)
    from torch.nn.attention import varlen

    real = varlen.varlen_attn if real == "installed" else real
    calls = []

    @functools.wraps(real)  # with the signature of the real one
    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append(inspect.signature(real).bind(*args, **options).arguments)
        return args[0]

    monkeypatch.setattr(varlen, "varlen_attn", spy)
    kernel = choose_attention_kernel("auto", CUDA, BF16, document_mask=True, head_width=8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    causal_attention(*qkv(6, 6), kernel, documents=PackedDocuments.from_positions(positions, kernel, FP32))
    (call,) = calls
    assert call["query"].shape == (12, 4, 8)
    assert call["key"].shape == call["value"].shape == (12, 2, 8)
    assert call["cu_seq_q"].tolist() == call["cu_seq_k"].tolist() == [0, 3, 6, *[12] * 10]  # padded: room for 12
    assert call["cu_seq_q"].dtype == torch.int32
    assert (call["max_q"], call["max_k"]) == (6, 6)
    assert call["window_size"] == (-1, 0)  # torch's words for causal
    assert call.get("enable_gqa", False) == ("enable_gqa" in inspect.signature(real).parameters)


def test_auto_is_sdpa_where_flash_cannot_run(install: Any):
    install(H100, "flash_attn", "flash_attn_interface")
    assert choose_attention_kernel("auto", CPU, BF16) == AttentionKernel(
        "sdpa", "FlashAttention needs CUDA, the device is cpu"
    )
    mps = torch.device("mps")
    assert choose_attention_kernel("auto", mps, BF16, head_width=64) == AttentionKernel(
        "sdpa", "FlashAttention needs CUDA, the device is mps"
    )
    assert choose_attention_kernel("auto", CUDA, FP32) == AttentionKernel(
        "sdpa", "FlashAttention needs bf16 or fp16, the dtype is float32"
    )


@pytest.mark.parametrize("name", ["sdpa", "math"])
def test_an_explicit_kernel_is_obeyed(install: Any, name: Any):
    install(H100, "flash_attn")
    assert choose_attention_kernel(name, CUDA, BF16) == AttentionKernel(name, f"engine.attention is {name}")
    masked = choose_attention_kernel(name, CUDA, BF16, document_mask=True, head_width=64)
    assert masked == AttentionKernel(name, f"engine.attention is {name}; a mask keeps documents apart")


def test_an_explicit_flash_runs_or_is_refused(install: Any):
    install(A100, "flash_attn")
    assert choose_attention_kernel("flash", CUDA, torch.float16).name == "flash-attn"
    with pytest.raises(UserError) as error:
        choose_attention_kernel("flash", CPU, BF16)
    (problem,) = error.value.problems
    assert problem.change == "engine.attention"
    assert "the device is cpu" in problem.saw


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "fast", "head_width", "name", "reason"),
    [
        (BF16, True, 64, "blocked", "faster than SDPA on a CPU with AVX512-bf16"),
        (FP32, True, 64, "blocked", "faster than SDPA on a CPU with AVX512-bf16"),
        (BF16, False, 64, "sdpa", "on CPUs with AVX512-bf16 only"),
        (torch.float16, True, 64, "sdpa", "on CPUs with AVX512-bf16 only"),
        (BF16, True, None, "sdpa", "the device is cpu"),
    ],
)
def test_a_cpu_takes_our_own_where_it_was_found_faster(
    *,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
    dtype: torch.dtype,
    fast: bool,
    head_width: int | None,
    name: str,
    reason: str,
):
    monkeypatch.setattr(attention, "_has_avx512_bf16", lambda: fast)
    kernel = choose_attention_kernel("auto", CPU, dtype, dropout=dropout, head_width=head_width)
    assert kernel.name == name
    assert kernel.reason.endswith(reason)
    masked = choose_attention_kernel("auto", CPU, dtype, dropout=dropout, document_mask=True, head_width=head_width)
    assert masked == AttentionKernel(kernel.name, f"{kernel.reason}; a mask keeps documents apart")


@pytest.fixture
def fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX512-bf16, on a torch that says so in public."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def auto_on_this_cpu() -> AttentionKernel:
    return choose_attention_kernel("auto", CPU, BF16, head_width=64)


@pytest.mark.usefixtures("fast_cpu")
def test_without_the_private_word_for_avx512_bf16_the_public_one_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert auto_on_this_cpu().name == "blocked"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert auto_on_this_cpu().name == "sdpa"


@pytest.mark.usefixtures("fast_cpu")
@pytest.mark.parametrize("has", [True, False])
def test_a_torch_before_the_public_word_is_asked_by_the_private_one(monkeypatch: pytest.MonkeyPatch, has: bool):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert auto_on_this_cpu().name == ("blocked" if has else "sdpa")


@pytest.mark.usefixtures("fast_cpu")
def test_a_torch_that_does_not_know_avx512_bf16_takes_sdpa_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    reason = "blocked is faster with AVX512-bf16 only, and this torch does not say whether the CPU has it"
    assert auto_on_this_cpu() == AttentionKernel("sdpa", reason)


@pytest.mark.usefixtures("fast_cpu")
@pytest.mark.parametrize("operator", [None, SimpleNamespace(default=None)], ids=["gone", "without .out"])
def test_a_torch_without_the_softmax_backward_takes_sdpa_and_says_so(monkeypatch: pytest.MonkeyPatch, operator: Any):
    operators = {} if operator is None else {"_softmax_backward_data": operator}
    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace(**operators))
    reason = "this torch has no operator aten::_softmax_backward_data.out, which blocked needs"
    assert auto_on_this_cpu() == AttentionKernel("sdpa", reason)
    with pytest.raises(UserError) as error:
        choose_attention_kernel("blocked", CPU, BF16, head_width=64)
    (problem,) = error.value.problems
    assert (problem.saw, problem.change) == (reason, "engine.attention")


def test_this_cpu_is_asked_what_it_can_multiply():
    cpus = Path("/proc/cpuinfo")
    if not cpus.is_file() or platform.machine() != "x86_64":
        pytest.skip(
            "only x86 has the instructions, and Linux a file that tells; the test above runs the choice either way"
        )
    assert attention._has_avx512_bf16() == ("avx512_bf16" in cpus.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("device", "head_width", "saw"), [(CUDA, 64, "the device is cuda"), (CPU, None, "a model of transformers")]
)
def test_an_explicit_blocked_runs_or_is_refused(device: torch.device, head_width: int | None, saw: str):
    asked = choose_attention_kernel("blocked", CPU, FP32, document_mask=True, head_width=8)
    assert asked == AttentionKernel("blocked", "engine.attention is blocked; a mask keeps documents apart")
    with pytest.raises(UserError) as error:
        choose_attention_kernel("blocked", device, BF16, head_width=head_width)
    (problem,) = error.value.problems
    assert (problem.saw, problem.change) == (saw, "engine.attention")


@pytest.mark.parametrize(
    ("name", "device", "only_causal", "allowed"),
    [
        ("sdpa", CUDA, True, True),  # torch knows when to prefer it
        ("sdpa", CUDA, False, False),
        ("sdpa", CPU, False, True),
        ("math", CUDA, True, False),
    ],
)
def test_cudnn_gets_causal_rows_only(*, name: Any, device: torch.device, only_causal: bool, allowed: bool):
    with attention._sdpa_backends(AttentionKernel(name, ""), device, only_causal=only_causal):
        assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
        assert torch.backends.cuda.mem_efficient_sdp_enabled() == (name != "math")
    assert torch.backends.cuda.cudnn_sdp_enabled()
