"""What only a CUDA device can show; `./tests/run.sh -m gpu` on such a machine."""

import contextlib
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.loss import make_loss_case, peak_memory_mib
from smoltrain.config.schema import ModelSection, TransformersSection
from smoltrain.data.rows.batch import Batch
from smoltrain.errors import DONE
from smoltrain.kernels import attention, loss
from smoltrain.kernels.attention import (
    AttentionKernel,
    PackedDocuments,
    _import_torch_varlen,
    causal_attention,
    choose_attention_kernel,
)
from smoltrain.kernels.flash_attention import prefers_cudnn
from tests import launches, tiny
from tests.models import build_with

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; test_attention.py runs the choice"),
]


CUDA, BF16 = torch.device("cuda"), torch.bfloat16
FLASH = importlib.util.find_spec("flash_attn") or importlib.util.find_spec("flash_attn_interface")  # 2, 4, or 3
needs_flash = pytest.mark.skipif(
    not FLASH, reason="needs flash-attn; test_documents.py and test_attention.py run it with stand-ins"
)


def has_varlen_with_shared_heads() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    module = importlib.import_module("torch.nn.attention.varlen")
    return "enable_gqa" in inspect.signature(module.varlen_attn).parameters


needs_shared_heads = pytest.mark.skipif(
    not has_varlen_with_shared_heads(),
    reason="this torch has no varlen_attn with shared heads; test_attention.py says what is taken then",
)
LENGTHS = [[1, 1, 100, 54, 100], [256]]  # of documents, in two rows


def heads(num: int, width: int = 64, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(2, num, 256, width, device="cuda", dtype=dtype, requires_grad=True)


def positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(n, device="cuda") for n in row]) for row in LENGTHS])


def masked(q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel) -> list[Tensor]:
    """Attention within each document, and the gradients of a loss of it."""
    out = causal_attention(q, k, v, kernel, documents=PackedDocuments.from_positions(positions(), kernel, q.dtype))
    return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Of tensors that may be part of a graph, which torch warns of where a number is made of them."""
    ours, reference = ours.detach().float(), reference.detach().float()
    return float((ours - reference).norm() / reference.norm())


@contextlib.contextmanager
def refuse_to_wait() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error inside.

    Of the mode itself torch warns once that it does not see everything, which pytest would make an error of: outside
    of what is tried here, and with the mode left on for all tests behind.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("default")


def test_every_kernel_agrees_with_math_forward_and_backward() -> None:
    torch.manual_seed(0)
    q, k, v = heads(9), heads(3), heads(3)
    device, results = torch.device("cuda"), {}
    for name in ("math", "sdpa", "auto"):
        requested: Any = name
        out = causal_attention(q, k, v, choose_attention_kernel(requested, device, torch.bfloat16))
        results[name] = (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for name in ("sdpa", "auto"):
        for ours, reference in zip(results[name], results["math"], strict=True):
            error = relative_error(ours, reference)
            assert error < 0.02, f"{name} is off by {error:.3f}"


def test_hopper_without_packages_runs_on_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the operator that ran; any other GPU runs torch's FlashAttention."""
    monkeypatch.setattr(attention, "find_flash_attention", lambda *args, **options: (None, "a test"))
    kernel = choose_attention_kernel("auto", CUDA, BF16, head_width=64)
    capability = torch.cuda.get_device_capability()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        causal_attention(heads(9), heads(3), heads(3), kernel).sum().backward()
    ran = {event.key for event in profile.key_averages()}
    cudnn = prefers_cudnn(capability, torch.backends.cudnn.version() or 0, dropout=0.0, head_width=64)
    assert ("aten::_scaled_dot_product_cudnn_attention" in ran) == cudnn
    assert ("aten::_scaled_dot_product_flash_attention" in ran) != cudnn


def check_documents(kernel: AttentionKernel, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    q, k, v = heads(9, width, dtype), heads(3, width, dtype), heads(3, width, dtype)
    q32, k32, v32 = (x.detach().float().requires_grad_() for x in (q, k, v))
    results, reference = masked(q, k, v, kernel), masked(q32, k32, v32, AttentionKernel("math", ""))
    for ours, truth in zip(results, reference, strict=True):
        assert relative_error(ours, truth) < 0.02, kernel.reason
    whole = causal_attention(q32, k32, v32, AttentionKernel("math", ""))
    assert relative_error(whole[0], reference[0][0]) > 0.1  # the documents matter


@needs_shared_heads
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("width", [8, 64, 128, 192])
def test_varlen_of_torch_keeps_documents_apart_as_the_mask_does(dtype: torch.dtype, width: int) -> None:
    varlen, words = _import_torch_varlen(0.0, width)
    assert words == "torch's varlen_attn"
    check_documents(AttentionKernel("sdpa", words, varlen=varlen), dtype, width)


@needs_flash
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
def test_varlen_of_flash_attn_keeps_documents_apart_as_the_mask_does(dtype: torch.dtype, width: int) -> None:
    kernel = choose_attention_kernel("flash", CUDA, dtype, document_mask=True, head_width=width)
    assert kernel.varlen is not None
    check_documents(kernel, dtype, width)


def test_the_mask_keeps_documents_apart_on_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    check_documents(choose_attention_kernel("sdpa", CUDA, BF16, document_mask=True, head_width=64), BF16, 64)
    monkeypatch.setattr(attention, "BACKENDS_WITHOUT_CUDNN", [SDPBackend.EFFICIENT_ATTENTION])  # or none
    for dtype in (BF16, torch.float32):
        masked(heads(9, dtype=dtype), heads(3, dtype=dtype), heads(3, dtype=dtype), AttentionKernel("sdpa", ""))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_decoder_keeps_documents_apart_in_bf16(checkpointing: Any) -> None:
    section = ModelSection(
        vocab_size=61,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    kernel = choose_attention_kernel("auto", CUDA, BF16, document_mask=True, head_width=32)
    torch.manual_seed(0)
    model = build_with(section, attention=kernel, gradient_checkpointing=checkpointing).to(CUDA, BF16)
    ids = torch.randint(61, (2, 256), device="cuda")
    packed = model(ids, positions_BT=positions())
    model(ids, ids, positions_BT=positions()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    alone = torch.cat([model(document[None])[0] for document in ids[0].split(LENGTHS[0])])
    assert relative_error(packed[0], alone) < 0.03
    assert relative_error(model(ids)[0], alone) > 0.1


@needs_flash
def test_transformers_keeps_documents_apart_on_flash_attn() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    section = TransformersSection(
        kind="transformers", model_type="llama", vocab_size=61, max_position_embeddings=256, config=config
    )
    kernel = choose_attention_kernel("flash", CUDA, BF16, document_mask=True)
    model = build_with(section, attention=kernel, document_mask=True).to(CUDA, BF16)  # checked while it is built
    ids = torch.randint(61, (2, 256), device="cuda")
    packed = model(ids, positions_BT=positions())
    alone = torch.cat([model(document[None])[0] for document in ids[0].split(LENGTHS[0])])
    assert relative_error(packed[0], alone) < 0.03


FUSED = loss.choose_loss_kernel("fused", CUDA, BF16, compiles=False)
LOSSES = {
    "fused": FUSED,
    "compiled": replace(FUSED, compiles=True),
    "auto": loss.choose_loss_kernel("auto", CUDA, BF16, compiles=True),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_loss_and_its_gradients_are_those_of_fp32(
    name: str, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if z_loss and LOSSES[name].name == "liger":
        pytest.skip("Liger's kernel is not taken with z_loss; test_loss.py tests the choice")
    monkeypatch.setattr(loss, "_chunk_bytes", lambda memory: 2**24)  # 8 chunks of 256 rows
    case = make_loss_case(2048, 49_152, 576, BF16, CUDA)
    wide, plain = case.to(torch.float32), case.to(BF16)
    truth, theirs = wide.forward_backward(loss.PLAIN_LOSS, z_loss), plain.forward_backward(loss.PLAIN_LOSS, z_loss)
    ours = case.forward_backward(LOSSES[name], z_loss)
    assert ours[0].dtype == torch.float32
    assert relative_error(ours[0], truth[0]) < 1e-4
    for gradient, plain_gradient, true_gradient in zip(ours[1:], theirs[1:], truth[1:], strict=True):
        assert relative_error(gradient, true_gradient) < 1.34 * relative_error(plain_gradient, true_gradient)


def test_the_weights_gradient_is_added_up_in_fp32_by_the_product() -> None:
    """As long a sum as that of an unembedding in which 1 is added to 512 many times: in bf16 it would stand still."""
    total = torch.full((256, 64), 512.0, device=CUDA)
    dlogits = torch.ones(256, 256, device=CUDA, dtype=BF16)
    hidden = torch.full((256, 64), 1 / 256, device=CUDA, dtype=BF16)
    for _ in range(8):
        loss._accumulate_weight_gradient(total, dlogits, hidden)
    assert torch.equal(total, torch.full_like(total, 520.0))


@pytest.mark.parametrize("name", ["fused", "compiled"])
def test_our_loss_never_waits_for_the_device(name: str) -> None:
    case = make_loss_case(1024, 49_152, 576, BF16, CUDA)
    case.forward_backward(LOSSES[name])
    with refuse_to_wait():
        case.forward_backward(LOSSES[name])


@pytest.mark.parametrize("separator_id", [None, 0])
def test_a_micro_batch_never_waits_for_the_device(separator_id: int | None) -> None:
    section = ModelSection(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=256, max_position_embeddings=256,
    )  # fmt: skip
    kernel = choose_attention_kernel("auto", CUDA, BF16, document_mask=separator_id is not None, head_width=64)
    model = build_with(section, attention=kernel, loss=FUSED).to(CUDA, BF16)
    batch = Batch(torch.randint(512, (2, 257), dtype=torch.int32), separator_id)

    def run() -> None:
        there = batch.to(CUDA)
        model(there.ids_BT, there.labels_BT, **there.document_arguments()).backward()

    run()
    with refuse_to_wait():
        run()


def test_what_refuses_to_wait_sees_a_read_and_is_gone_afterwards() -> None:
    number = torch.ones((), device=CUDA)
    with refuse_to_wait(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()
    assert number.item() == 1.0


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_needs_a_quarter_of_the_memory_of_plain_logits(name: str) -> None:
    case = make_loss_case(8 * 2048, 49_152, 576, BF16, CUDA)
    case.forward_backward(LOSSES[name])
    ours, plain = (peak_memory_mib(lambda k=k: case.forward_backward(k), CUDA) for k in (LOSSES[name], loss.PLAIN_LOSS))
    assert 4 * ours < plain


def test_fp16_gradients_survive_a_large_sum() -> None:
    kernel = loss.choose_loss_kernel("auto", CUDA, torch.float16, compiles=True)
    hidden = torch.full((16384, 64), 8.0, device=CUDA, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(1000, 64, device=CUDA, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(16384, device=CUDA, dtype=torch.long)  # one word's gradient adds up to twice fp16's largest
    (loss.summed_cross_entropy(hidden, weight, labels, kernel) / 16384).backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert relative_error(weight.grad[0], torch.full((64,), -8.0 * 0.999, device=CUDA)) < 0.01


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_all_gpus_train_save_and_resume(tmp_path: Path, precision: str) -> None:
    config = "zero2_fp16" if precision == "fp16" else "zero2"
    words = tiny.words(tmp_path, f"engine.precision={precision}", f"engine.ds_config={config}")
    assert launches.run("smoltrain", words, tmp_path / "log") == DONE, (tmp_path / "log").read_text()
    losses = launches.losses(tmp_path / "runs" / "quickstart")
    assert sorted(losses) == list(range(1, 13))
    assert losses[12] < losses[1]
