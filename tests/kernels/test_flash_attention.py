"""Which kernel a GPU gets, and why: held for each generation on a CPU. What is installed is tried before it is used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from smoltrain.errors import UserError
from smoltrain.kernels import flash_attention
from smoltrain.kernels.attention import AttentionKernel, choose_attention_kernel
from smoltrain.kernels.flash_attention import (
    CUDNN,
    TITLES,
    FlashAttention,
    prefers_cudnn,
    rank_attention_kernels,
    try_flash_attention,
)
from smoltrain.model.recompute import find_kept_operators
from tests.kernels.flash_packages import FakeInterface, pretend_gpu

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
FA2, FA3, FA4 = "flash_attn", "flash_attn_interface", "flash_attn.cute"
ALL = (FA2, FA3, FA4)
A100, ADA, H100, B200, B300, THOR, RTX50 = (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0)
NOT_INSTALLED = "flash-attn (extra flash) is not installed, or not for this torch"
CUDNN_FIRST = "; SDPA asks cuDNN first, which is faster on this GPU than FlashAttention 2"


# Each row: GPU, installed, what it gets for rows, what it gets for documents, and the reason for rows.
@pytest.mark.parametrize(
    ("capability", "installed", "rows", "documents", "reason"),
    [
        (A100, ALL, FA2, FA2, "FlashAttention 2 is installed"),
        (A100, (FA3, FA4), "sdpa", "sdpa", NOT_INSTALLED),
        (A100, (), "sdpa", "sdpa", NOT_INSTALLED),
        (ADA, ALL, FA2, FA2, "FlashAttention 2 is installed"),
        (ADA, (), "sdpa", "sdpa", NOT_INSTALLED),
        (H100, ALL, FA3, FA3, "FlashAttention 3 is installed and the device is a Hopper GPU"),
        (H100, (FA2, FA4), FA4, FA4, "FlashAttention 4 is installed and the device is a Hopper GPU"),
        (H100, (FA2,), "cudnn", FA2, "FlashAttention 3 or FlashAttention 4 is not installed, or not for this torch"
         + CUDNN_FIRST),
        (H100, (), "cudnn", "sdpa", "FlashAttention 3 or FlashAttention 4 is not installed, or not for this torch"
         + CUDNN_FIRST),
        (B200, ALL, FA4, FA4, "FlashAttention 4 is installed and the device is a Blackwell GPU"),
        (B300, (FA2, FA3), "cudnn", FA2, "FlashAttention 4 is not installed, or not for this torch" + CUDNN_FIRST),
        (B200, (), "cudnn", "sdpa", "FlashAttention 4 is not installed, or not for this torch" + CUDNN_FIRST),
        (THOR, ALL, FA4, FA4, "FlashAttention 4 is installed and the device is a Blackwell GPU"),
        (RTX50, ALL, FA2, FA2, "FlashAttention 2 is installed"),
        (RTX50, (FA4,), FA4, FA4, "FlashAttention 4 is installed and the device is a Blackwell GPU"),
        (RTX50, (), "sdpa", "sdpa", NOT_INSTALLED),
    ],
)  # fmt: skip
def test_each_gpu_gets_the_fastest_that_is_installed(
    *, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: tuple[str, ...], rows: str,
    documents: str, reason: str,
):  # fmt: skip
    pretend_gpu(monkeypatch, capability, *installed)
    kernel = choose_attention_kernel("auto", CUDA, BF16, head_width=64)
    assert (kernel_of(kernel), kernel.reason) == (rows, reason)
    masked = choose_attention_kernel("auto", CUDA, BF16, head_width=64, document_mask=True)
    assert kernel_of(masked) == documents
    assert masked.varlen is not None
    assert masked.reason.endswith("keeps documents apart")
    if installed:
        asked = choose_attention_kernel("flash", CUDA, BF16, head_width=64) if FA2 in installed else None
        assert asked is None or asked.name == "flash-attn"


def kernel_of(kernel: AttentionKernel) -> str:
    if kernel.sdpa_first == SDPBackend.CUDNN_ATTENTION:
        assert kernel.name == "sdpa"
        return "cudnn"
    return kernel.package or kernel.name


@pytest.mark.parametrize(
    ("capability", "options", "chosen"),
    [
        (H100, {"head_width": 256}, FA3),
        (H100, {"head_width": 60}, FA2),  # which widens heads to a multiple of 8
        (H100, {"head_width": 64, "dropout": 0.1}, FA2),  # the others have none
        (B200, {"head_width": 192}, FA2),  # version 4 has no backward pass there beyond 128, nor has cuDNN everywhere
        (B200, {"head_width": 512}, "sdpa"),
        (H100, {"head_width": None}, FA3),  # a model of transformers
    ],
)
def test_what_a_model_needs_decides_too(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], options: dict[str, Any], chosen: str
):
    pretend_gpu(monkeypatch, capability, *ALL)
    kernel = choose_attention_kernel("auto", CUDA, BF16, **options)
    assert kernel_of(kernel) == chosen
    if options["head_width"] == 512:
        assert kernel.reason == "no FlashAttention takes heads 512 wide"


def test_cudnn_is_asked_first_where_it_is_right_and_fast():
    fits: dict[str, Any] = {"dropout": 0.0, "head_width": 64}
    assert [g for g in (A100, ADA, H100, B200, B300, THOR, RTX50) if prefers_cudnn(g, 91501, **fits)] == [
        H100, B200, B300,
    ]  # fmt: skip
    assert not prefers_cudnn(H100, 91500, **fits)  # wrong for lengths that 128 does not divide
    for unfit in ({"dropout": 0.1}, {"head_width": 60}, {"head_width": 136}, {"head_width": None}):
        assert not prefers_cudnn(H100, 91501, **{**fits, **unfit})


@pytest.mark.parametrize(
    ("gpu", "capability"),
    [("Ampere, Ada (8.x)", A100), ("Hopper (9.0)", H100), ("Blackwell (10.x)", B200),
     ("consumer Blackwell (12.x)", RTX50)],
)  # fmt: skip
def test_the_page_has_the_order_of_each_gpu(gpu: str, capability: tuple[int, int]):
    cells = [gpu]
    for masked in (False, True):
        ranked = rank_attention_kernels(capability, 91900, dropout=0.0, head_width=64, document_mask=masked)
        ranked = ranked[: ranked.index(CUDNN) + 1] if CUDNN in ranked else [*ranked, "torch"]
        last = {CUDNN: "cuDNN in SDPA", "torch": "torch's varlen_attn" if masked else "torch's own"}
        versions = [TITLES[name].removeprefix("FlashAttention ") for name in ranked[:-1]]
        cells.append(f"FlashAttention {', '.join(versions)}, {last[ranked[-1]]}")
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    assert f"| {' | '.join(cells)} |" in page


def test_a_package_that_fails_its_trial_is_named_and_passed_over(monkeypatch: pytest.MonkeyPatch):
    def tried(flash: FlashAttention, *_: Any) -> str | None:
        return None if flash.package == FA2 else "it is off by 97.0% here"

    pretend_gpu(monkeypatch, H100, FA2, FA4, tried=tried)
    said = "FlashAttention 4 is installed, but it is off by 97.0% here"
    assert choose_attention_kernel("auto", CUDA, BF16, head_width=64).reason == said + CUDNN_FIRST
    masked = choose_attention_kernel("auto", CUDA, BF16, head_width=64, document_mask=True)
    assert masked.reason == f"{said}; FlashAttention 2 is installed; it keeps documents apart"
    pretend_gpu(monkeypatch, H100, FA4, tried=tried)
    with pytest.raises(UserError, match="it is off by 97"):
        choose_attention_kernel("flash", CUDA, BF16, head_width=64)


@pytest.mark.parametrize("torch_has_it", [True, False])
def test_a_version_4_that_does_not_fit_goes_through_torch_where_torch_takes_it(
    torch_has_it: bool, monkeypatch: pytest.MonkeyPatch
):
    pretend_gpu(monkeypatch, B200, FA4)
    monkeypatch.delattr(FakeInterface, "_flash_attn_bwd")
    activated: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA4"] if torch_has_it else [])
    kernel = choose_attention_kernel("auto", CUDA, BF16, head_width=64, document_mask=True)
    if torch_has_it:
        assert activated == ["FA4"]
        assert kernel.reason.startswith("FlashAttention 4 is installed, behind torch's SDPA and the device is")
        assert kernel.reason.endswith("; torch's varlen_attn keeps documents apart")
        assert (kernel.flash, kernel.sdpa_first) == (None, SDPBackend.FLASH_ATTENTION)
        assert torch.ops.torch_attn._varlen_attn.default in find_kept_operators(kernel)
    else:
        assert kernel.reason.startswith("FlashAttention 4 is installed, but its _flash_attn_bwd is missing")
        assert kernel.package == ""


def right(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    assert causal
    return FakeInterface._attend(q, k, v, None)


def right_documents(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *_: Any) -> Tensor:
    return FakeInterface._attend(q, k, v, starts)


def blind_documents(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return right(q[None], k[None], v[None], causal=True)[0]


def forgets_a_gradient(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    return right(q, k, v.detach() + 0 * v, causal=causal)


def does_not_compile(*_: Any, **__: Any) -> Tensor:
    raise TypeError("no kernel for sm_90a\nin many lines")


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_trial_tells_right_from_wrong(dtype: torch.dtype):
    def trial(rows: Any, documents: Any, document_mask: bool) -> str | None:
        flash = FlashAttention(FA4, "test", (), rows, documents)
        state = torch.random.get_rng_state()
        said = try_flash_attention(flash, CPU, dtype, 64, document_mask)
        assert torch.equal(torch.random.get_rng_state(), state)
        return said

    assert trial(right, does_not_compile, False) is None
    assert trial(does_not_compile, right_documents, True) is None
    assert trial(does_not_compile, None, False) == "fails here: TypeError: no kernel for sm_90a"
    assert "it is off by" in str(trial(right, blind_documents, True))
    assert "it is off by" in str(trial(lambda *args, causal: right(*args, causal=causal) * 1.05, None, False))
    assert "it is off by" in str(trial(forgets_a_gradient, None, False))


def test_the_packages_are_called_by_the_names_of_their_arguments():
    seen: dict[str, Any] = {}
    call = flash_attention.by_keywords(lambda q, k, v, **options: seen.update(options) or q)
    call(1, 2, 3, "starts", "ends", 4, 5, dropout_p=0.5)
    assert seen == {
        "cu_seqlens_q": "starts", "cu_seqlens_k": "ends", "max_seqlen_q": 4, "max_seqlen_k": 5, "causal": True,
        "dropout_p": 0.5,
    }  # fmt: skip


def test_selective_keeps_what_the_chosen_kernel_computes(monkeypatch: pytest.MonkeyPatch):
    """The operators of version 2 and 3 stand here as their sources define them, by name."""
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define("_flash_attn_forward(Tensor q) -> Tensor")
    library.define("_flash_attn_varlen_forward(Tensor q) -> Tensor")
    library3 = torch.library.Library("flash_attn_3", "FRAGMENT")
    library3.define("_flash_attn_forward(Tensor q) -> Tensor")
    for package, device in ((FA2, A100), (FA3, H100), (FA4, B200)):
        pretend_gpu(monkeypatch, device, package)
        kernel = choose_attention_kernel("auto", CUDA, BF16, head_width=64)
        assert kernel.operators
        names = {str(operator) for operator in find_kept_operators(kernel)}
        assert {name.replace("::", ".") + ".default" for name in kernel.operators} <= names
    pretend_gpu(monkeypatch, A100)
    kernel = choose_attention_kernel("auto", CUDA, BF16, head_width=64, document_mask=True)
    assert torch.ops.torch_attn._varlen_attn.default in find_kept_operators(kernel)
    assert torch.ops.aten._scaled_dot_product_cudnn_attention.default in find_kept_operators(kernel)
    library._destroy()
    library3._destroy()
