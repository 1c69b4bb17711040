"""The loss is the sum over valid tokens, in fp32, by whichever kernel; so are its gradients, and no logits are kept."""

import sys
from dataclasses import replace
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.torch_version import TorchVersion

from benchmarks.loss import make_loss_case, peak_memory_mib
from smoltrain.kernels import loss as loss_module
from smoltrain.kernels.compile import missing_for_compile
from smoltrain.kernels.loss import (
    IGNORE_INDEX,
    LIGER_MODULE,
    PLAIN_LOSS,
    LossKernel,
    choose_loss_kernel,
    summed_cross_entropy,
    summed_cross_entropy_of_logits,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FUSED, RECOMPUTED = LossKernel("fused", "a test"), LossKernel("recomputed", "a test")
COMPILED = replace(FUSED, compiles=True)
needs_compiler = pytest.mark.skipif(
    missing_for_compile("cpu") is not None, reason=f"{missing_for_compile('cpu')}; the same tests run without it"
)
V, D = 50, 16


@pytest.fixture(params=[PLAIN_LOSS, FUSED, RECOMPUTED], ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> LossKernel:
    return request.param


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch):
    in_chunks_of(7, monkeypatch)


def in_chunks_of(tokens: int, patch: pytest.MonkeyPatch, row_bytes: int = 4 * V):
    patch.setattr(loss_module, "CHUNK_BYTES", {"cpu": tokens * row_bytes})
    patch.setattr(loss_module, "ROWS_PER_SLICE", 16)


def case(tokens: int, ignored: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, D, generator=g), torch.randn(V, D, generator=g)
    labels = torch.randint(V, (tokens,), generator=g)
    labels[ignored] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def learned(
    kernel: LossKernel, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, factor: float = 0.37
) -> list[Tensor]:
    """The loss, and the gradients of the loss times a factor that lies on the device."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = summed_cross_entropy(hidden, weight, labels, kernel, z_loss)
    return [loss.detach(), *torch.autograd.grad(loss * torch.tensor(factor), (hidden, weight))]


def errors(ours: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(ours, truth, strict=True)]


@pytest.mark.parametrize(("tokens", "ignored"), [(40, []), (40, [0, 7, 39]), (1, []), (513, [512])])
def test_it_is_the_sum_over_valid_tokens(tokens: int, ignored: list[int], kernel: LossKernel):
    hidden, weight, labels = case(tokens, ignored)
    loss = summed_cross_entropy(hidden, weight, labels, kernel)
    valid = labels != IGNORE_INDEX
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    want = -(h[valid] @ w.T).log_softmax(-1).gather(1, labels[valid, None]).sum()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    loss.backward()
    want.backward()
    torch.testing.assert_close(hidden.grad, h.grad, check_dtype=False, rtol=0, atol=1e-5)
    torch.testing.assert_close(weight.grad, w.grad, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_it_is_torch_cross_entropy():
    hidden, weight, labels = case(40, [3])
    want = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(summed_cross_entropy(hidden, weight, labels), want)
    torch.testing.assert_close(summed_cross_entropy_of_logits(hidden @ weight.T, labels), want)


@pytest.mark.parametrize("tokens", [0, 5, 20])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_no_valid_token_is_zero_with_zero_gradients(tokens: int, z_loss: float, kernel: LossKernel):
    hidden, weight, labels = case(tokens, list(range(tokens)))
    loss = summed_cross_entropy(hidden, weight, labels, kernel, z_loss)
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert hidden.grad is not None
    assert not weight.grad.any()
    assert not hidden.grad.any()


def test_bf16_weights_give_an_fp32_loss(kernel: LossKernel):
    hidden, weight, labels = case(512, [])
    loss = summed_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, kernel)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, summed_cross_entropy(hidden, weight, labels), rtol=2e-3, atol=0)


@given(st.data())
def test_chunks_change_nothing(data: st.DataObject):
    tokens, words = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 60))
    width, rows = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 45))
    z_loss = data.draw(st.sampled_from([0.0, 0.3]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    hidden, weight = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (tokens, words))
    labels = torch.randint(words, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < data.draw(st.sampled_from([0.0, 0.4, 1.0]))] = IGNORE_INDEX
    with pytest.MonkeyPatch.context() as patch:
        in_chunks_of(rows, patch, 8 * words)
        want = learned(PLAIN_LOSS, hidden, weight, labels, z_loss)
        for kernel in (FUSED, RECOMPUTED):
            ours = learned(kernel, hidden, weight, labels, z_loss)
            torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, labels = case(20, [0, 19])
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    assert torch.autograd.gradcheck(lambda h, w: summed_cross_entropy(h, w, labels, FUSED), inputs, fast_mode=True)


def test_fp32_gradients_are_the_plain_ones_to_1e_6(monkeypatch: pytest.MonkeyPatch):
    in_chunks_of(100, monkeypatch, 4 * 20_000)
    case = make_loss_case(300, 20_000, 64, torch.float32, CPU)
    want = learned(PLAIN_LOSS, case.hidden_ND, case.weight_VD, case.labels_N)
    for kernel in (FUSED, RECOMPUTED):
        assert max(errors(learned(kernel, case.hidden_ND, case.weight_VD, case.labels_N), want)) < 1e-6


def test_bf16_is_no_further_from_fp32_than_plain_bf16(monkeypatch: pytest.MonkeyPatch):
    """On average over the factors. For a single one it may be, at most by a third: ours rounds once more."""
    in_chunks_of(128, monkeypatch, 2 * 1000)
    case = make_loss_case(512, 1000, 128, torch.bfloat16, CPU)
    inputs, wide = (case.hidden_ND, case.weight_VD), (case.hidden_ND.float(), case.weight_VD.float())
    ratios = []
    for factor in (0.37, 0.55, 0.8, 1 / 777, 1 / 3777, 1 / 4096):
        truth = learned(PLAIN_LOSS, *wide, case.labels_N, factor=factor)
        ours, plain = (errors(learned(k, *inputs, case.labels_N, factor=factor), truth) for k in (FUSED, PLAIN_LOSS))
        assert max(plain) < 0.01
        assert ours[0] < 2 * plain[0] + 1e-6
        ratios += [x / y for x, y in zip(ours[1:], plain[1:], strict=True)]
    assert max(ratios) < 1.34
    assert mean(ratios) < 1.05


def test_z_loss_moves_the_gradient_and_not_the_value(kernel: LossKernel):
    hidden, weight, labels = case(40, [3, 17])
    ours = learned(kernel, hidden, weight, labels, z_loss=0.1)
    logits = hidden.double() @ weight.double().T
    log_z = logits.logsumexp(-1)[labels != IGNORE_INDEX]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    want = [loss.detach(), *torch.autograd.grad(0.37 * (loss + 0.1 * log_z.square().sum()), (hidden, weight))]
    assert max(errors(ours, want)) < 1e-6
    assert ours[0] == learned(kernel, hidden, weight, labels)[0]
    assert errors(learned(kernel, hidden, weight, labels)[1:], want[1:])[0] > 0.1


def test_the_backward_pass_can_run_twice(kernel: LossKernel):
    hidden, weight, labels = case(40, [])
    loss = summed_cross_entropy(hidden, weight, labels, kernel)
    once, again = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_what_is_frozen_gets_no_gradient(kernel: LossKernel):
    hidden, weight, labels = case(40, [])
    want = learned(PLAIN_LOSS, hidden, weight, labels)
    summed_cross_entropy(hidden.detach(), weight, labels, kernel).mul(0.37).backward()
    summed_cross_entropy(hidden, weight.detach(), labels, kernel).mul(0.37).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert max(errors([hidden.grad, weight.grad], want[1:])) < 1e-6


def test_tied_weights_add_up_their_gradients(kernel: LossKernel):
    _, weight, _ = case(1, [])
    ids = torch.arange(40) % V
    hidden = F.embedding(ids, weight).tanh()
    ours, want = (
        torch.autograd.grad(summed_cross_entropy(hidden, weight, ids.flip(0), k), weight, retain_graph=True)[0]
        for k in (kernel, PLAIN_LOSS)
    )
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


def test_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    case = make_loss_case(256, 20_000, 128, torch.bfloat16, CPU)
    inputs = case.hidden_ND, case.weight_VD, case.labels_N
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = summed_cross_entropy(*inputs, FUSED)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, summed_cross_entropy(*inputs).detach(), rtol=1e-5, atol=0)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 8 * 2 * 20_000})
    weight_mib = case.weight_VD.nbytes / 2**20
    with torch.no_grad():
        assert peak_memory_mib(lambda: summed_cross_entropy(*inputs, FUSED), CPU) < weight_mib / 2
    assert peak_memory_mib(lambda: summed_cross_entropy(*inputs, FUSED).backward(), CPU) > weight_mib


def test_fp16_keeps_what_only_the_loss_scale_saves():
    hidden, weight, labels = (x.detach().clone() for x in case(512, []))
    scale = torch.tensor(2.0**16)
    weight.mul_(2e-6)  # and with it the gradient for hidden
    hidden, weight = (x.half().requires_grad_() for x in (hidden, weight))
    want, ours, lost = (
        torch.autograd.grad(summed_cross_entropy(hidden, weight, labels, k) / 512 * scale, (hidden, weight))
        for k in (PLAIN_LOSS, RECOMPUTED, FUSED)
    )
    assert max(errors(list(ours), list(want))) < 2e-3
    assert max(errors(list(lost), list(want))) > 5e-3


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "name", "reason"),
    [
        ("auto", CPU, torch.bfloat16, "fused", "Liger's kernel needs CUDA, the device is cpu"),
        ("auto", CPU, torch.float32, "fused", "Liger's kernel needs CUDA, the device is cpu"),
        ("fused", CPU, torch.bfloat16, "fused", "engine.loss is fused"),
        ("fused", CUDA, torch.bfloat16, "fused", "engine.loss is fused"),
        ("plain", CUDA, torch.float16, "plain", "engine.loss is plain"),
        ("auto", CUDA, torch.float16, "recomputed", "the loss scale is known"),
        ("fused", CUDA, torch.float16, "recomputed", "the loss scale is known"),
        ("auto", CUDA, torch.bfloat16, "fused", "not installed"),
    ],
)
def test_the_kernel_and_the_reason(
    requested: Any, device: torch.device, dtype: torch.dtype, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, LIGER_MODULE, None)
    chosen = choose_loss_kernel(requested, device, dtype, compiles=True)
    assert chosen.name == name
    assert reason in chosen.reason
    assert chosen.compiles == (name == "fused")


def liger(
    input: Tensor, weight: Tensor, target: Tensor, bias: None = None, *, ignore_index: int = -1,
    reduction: str = "mean", accum_dtype: torch.dtype | None = None, chunk_mem_const: int = 1,
) -> Any:  # fmt: skip
    """As Liger's function of this name."""
    assert accum_dtype == torch.float32
    logits = (input @ weight.T).float()
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


def test_liger_is_asked_for_the_same_loss_and_for_none_with_z_loss(monkeypatch: pytest.MonkeyPatch):
    package = ModuleType(LIGER_MODULE)
    package.__dict__["liger_fused_linear_cross_entropy"] = liger
    monkeypatch.setitem(sys.modules, LIGER_MODULE, package)
    chosen = choose_loss_kernel("auto", CUDA, torch.bfloat16, compiles=True)
    assert (chosen.name, chosen.reason, chosen.compiles) == ("liger", "liger-kernel is installed", False)
    inputs = case(40, [3, 17])
    ours, want = (learned(kernel, *inputs) for kernel in (chosen, PLAIN_LOSS))
    assert max(errors(ours, want)) < 1e-6
    with torch.no_grad():  # nor is it asked where nothing is learned, or there are no tokens
        torch.testing.assert_close(summed_cross_entropy(*inputs, chosen), want[0])
    assert summed_cross_entropy(*case(0, []), chosen) == 0
    with_z_loss = choose_loss_kernel("auto", CUDA, torch.bfloat16, compiles=True, z_loss=1e-4)
    assert with_z_loss == LossKernel("fused", "Liger's kernel rounds z-losses to the dtype of the model", True)


def test_without_liger_the_reason_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, LIGER_MODULE, None)  # None: ImportError
    chosen = choose_loss_kernel("auto", CUDA, torch.bfloat16, compiles=True)
    want = "liger-kernel (extra gpu) is not installed, or not for this torch"
    assert (chosen.name, chosen.reason) == ("fused", want)


def test_an_older_liger_is_not_used(monkeypatch: pytest.MonkeyPatch):
    package = ModuleType(LIGER_MODULE)
    package.__dict__["liger_fused_linear_cross_entropy"] = lambda input, weight, target, reduction: None
    monkeypatch.setitem(sys.modules, LIGER_MODULE, package)
    chosen = choose_loss_kernel("auto", CUDA, torch.bfloat16, compiles=True)
    assert (chosen.name, chosen.reason) == ("fused", "liger-kernel is installed, but older than 0.8.5")


@pytest.mark.parametrize(
    ("tokens", "memory_gib", "rows"),
    [
        (32_768, 141, 5632),  # H200: 6 chunks of 564 MiB at most, as 5461 rounded up
        (32_768, 24, 1280),  # 128 MiB
        (32_768, 512, 8192),  # 1 GiB at most: 4 chunks
        (32_768, None, 2560),  # a GPU that cannot be asked
        (1000, 80, 1000),
        (2000, 24, 1024),
    ],
)
def test_a_chunk_on_a_gpu_is_a_multiple_of_256_rows(
    tokens: int, memory_gib: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
):
    memory = None if memory_gib is None else memory_gib * 2**30
    monkeypatch.setattr(loss_module, "_device_memory_bytes", lambda device: memory)
    assert loss_module._tokens_per_chunk(tokens, 2 * 49_152, CUDA) == rows


def test_the_weights_gradient_is_added_up_by_the_product_itself(monkeypatch: pytest.MonkeyPatch):
    """torch's own parser and schema of addmm take the call; what cuBLAS does stands here as a CPU can."""
    calls: list[torch.dtype] = []

    def addmm(
        total: Tensor, x: Tensor, y: Tensor, dtype: torch.dtype, *, beta: int = 1, alpha: int = 1, out: Tensor
    ) -> Tensor:
        assert out.data_ptr() == total.data_ptr()
        assert (total.dtype, x.dtype, y.dtype, beta, alpha) == (dtype, torch.bfloat16, torch.bfloat16, 1, 1)
        calls.append(dtype)
        return out.add_(x.float() @ y.float())

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(loss_module, "_can_add_products_in_fp32", lambda device_type: True)
    hidden, weight, labels = case(40, [3])
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    truth = learned(PLAIN_LOSS, hidden.float(), weight.float(), labels)
    ours = learned(FUSED, hidden, weight, labels)
    library._destroy()
    assert calls == [torch.float32] * 3  # chunks of 14, as a number is half as wide as in fp32
    assert max(errors(ours, truth)) < 5e-3


@pytest.mark.parametrize(
    ("device", "version", "hip", "can"),
    [
        ("cuda", "2.11.0+cu130", None, True),
        ("cuda", "2.13.0", None, True),
        ("cuda", "2.9.1", None, False),
        ("cuda", "2.13.0", "7.0", False),
        ("cpu", "2.13.0+cpu", None, False),
    ],
)
def test_where_products_are_added_in_fp32(
    device: str, version: str, hip: str | None, can: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert loss_module._can_add_products_in_fp32(device) == can


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_compiled_softmax_gives_the_same_numbers(dtype: torch.dtype, z_loss: float):
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in case(40, [0, 39])]
    eager, compiled = (learned(kernel, *inputs, z_loss=z_loss) for kernel in (FUSED, COMPILED))
    assert max(errors(compiled, eager)) < (1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_softmax_reads_the_logits_before_it_overwrites_them(monkeypatch: pytest.MonkeyPatch):
    """Rows so long that a CPU's loop over them is one with what comes after: torch 2.11 had it the wrong way round."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 2**18})
    case = make_loss_case(256, 4096, 64, torch.bfloat16, CPU)
    eager, compiled = (case.forward_backward(kernel, 0.0)[0] for kernel in (FUSED, COMPILED))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # both of them torch's, of itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_caller_gives_the_same_numbers():
    hidden, weight, labels = case(40, [0, 39])

    def call(x: Tensor) -> Tensor:
        return 2 * summed_cross_entropy(x.tanh(), weight, labels, COMPILED)

    ours, want = (torch.autograd.grad(function(hidden), (hidden, weight)) for function in (torch.compile(call), call))
    assert max(errors(list(ours), list(want))) < 1e-6


@pytest.mark.slow
def test_the_loss_needs_a_quarter_of_the_memory_of_plain_logits(monkeypatch: pytest.MonkeyPatch):
    """T 2048, micro-batch 2, SmolLM2's head in bf16; the plain loss, which needs as much for each row, with one."""
    monkeypatch.undo()
    case = make_loss_case(2 * 2048, 49_152, 576, torch.bfloat16, CPU)
    row = replace(case, hidden_ND=case.hidden_ND[:2048].detach().requires_grad_(), labels_N=case.labels_N[:2048])
    fused, plain = (
        peak_memory_mib(lambda: case.forward_backward(FUSED), CPU),
        2 * peak_memory_mib(lambda: row.forward_backward(PLAIN_LOSS), CPU),
    )
    assert 4 * fused < plain, f"{fused:.0f} MiB against {plain:.0f}"
    assert fused < 250  # the gradients, of which the weight's is fp32, and a chunk of logits
