"""Documents packed in a row are computed as if each were alone: logits and gradients, whatever keeps them apart."""

import functools
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoltrain.data.rows.batch import Batch
from smoltrain.kernels.attention import AttentionKernel, PackedDocuments, causal_attention
from smoltrain.model import decoder
from smoltrain.model.decoder import Decoder
from smoltrain.model.interface import LanguageModel
from tests.kernels.test_attention import assert_same_gradients, definition, fake_flash
from tests.model.test_decoder import as_llama, llama
from tests.model.tiny_decoders import GPT2, LLAMA, NEOX, built, gradients, section

Layout = list[list[int]]  # the lengths of the documents of each row

SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-untied-biases": {**LLAMA, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama-mqa": {**LLAMA, "num_key_value_heads": 1, "rope_theta": 100000.0, "rms_norm_eps": 1e-3},
    "gpt2": GPT2,
    "neox": NEOX,
}
LAYOUT = [[20], [1, 1, 7, 11], [13, 6, 1], [1] * 20]


@st.composite
def layouts(draw: Any) -> Layout:
    """One to three rows of 1 to 12 tokens, each cut anywhere."""
    T = draw(st.integers(1, 12))
    rows = draw(st.lists(st.sets(st.integers(1, T)), min_size=1, max_size=3))
    edges = [[0, *sorted(cuts | {T})] for cuts in rows]
    return [[b - a for a, b in pairwise(row)] for row in edges]


def positions_of(layout: Layout) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in layout])


def varlen2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """What flash_attn_varlen_func documents: [tokens, H, E]; sequence i is the tokens cu_seqlens[i] to [i + 1]."""
    assert causal
    assert dropout_p == 0.0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts, ends = cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()
    assert (starts[0], ends[-1]) == (0, len(q))
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
    lengths = cu_seqlens_q.diff()
    assert int(lengths.min()) >= 0
    assert int(lengths.count_nonzero()) == int((lengths > 0).long().cumprod(0).sum()), "padded at the end alone"
    places = [(a, b) for a, b in zip(starts, ends, strict=True) if a < b]
    heads = ([x[None, a:b].transpose(1, 2) for x in (q, k, v)] for a, b in places)
    return torch.cat([definition(*document)[0].transpose(0, 1) for document in heads])


def varlen3_beta(*args: Any, causal: bool) -> tuple[Tensor, str]:
    return varlen2(*args, causal=causal), "log-sum-exp"


KERNELS = {
    "sdpa": AttentionKernel("sdpa", "test"),
    "math": AttentionKernel("math", "test"),
    "flash2": AttentionKernel("flash-attn", "test", fake_flash, partial(varlen2, causal=True)),
    "flash3": AttentionKernel("flash-attn", "test", fake_flash, partial(varlen3_beta, causal=True)),
}


# ---- the kernels


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@settings(max_examples=40)
@given(layout=layouts(), kv_heads=st.sampled_from([1, 2, 4]))
def test_every_kernel_is_the_definition_within_each_document(kernel: AttentionKernel, layout: Layout, kv_heads: int):
    B, T = len(layout), sum(layout[0])
    g = torch.Generator().manual_seed(0)
    ours = [torch.randn(B, heads, T, 8, generator=g).requires_grad_() for heads in (4, kv_heads, kv_heads)]
    truth = [x.detach().clone().requires_grad_() for x in ours]
    q, k, v = ours
    out = causal_attention(
        q, k, v, kernel, documents=PackedDocuments.from_positions(positions_of(layout), kernel, torch.float32)
    )
    want = torch.empty_like(out)
    for row, lengths in enumerate(layout):
        start = 0
        for n in lengths:
            within = (slice(row, row + 1), slice(None), slice(start, start + n))
            want[within] = definition(*(x[within] for x in truth))
            start += n
    assert_same_gradients(out, want, ours, truth)


@pytest.mark.parametrize("name", ["sdpa", "math"])
def test_the_mask_takes_dropout_and_math_allows_no_fused_kernel(monkeypatch: pytest.MonkeyPatch, name: Any):
    seen: list[tuple[bool, float]] = []

    def spy(q: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append((torch.backends.cuda.flash_sdp_enabled(), options["dropout_p"]))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, kernel = torch.zeros(1, 2, 3, 8), AttentionKernel(name, "test")
    causal_attention(
        q, q, q, kernel, dropout=0.5, documents=PackedDocuments.from_positions(positions_of([[1, 2]]), kernel, q.dtype)
    )
    assert seen == [(name == "sdpa", 0.5)]


def test_dropout_reaches_flash_attention():
    seen: dict[str, Any] = {}
    kernel = AttentionKernel("flash-attn", "test", None, lambda q, *args, **options: seen.update(options) or q)
    q = torch.zeros(2, 2, 3, 8)
    documents = PackedDocuments.from_positions(positions_of([[1, 2], [3]]), kernel, q.dtype)
    causal_attention(q, q, q, kernel, dropout=0.5, documents=documents)
    assert seen == {"dropout_p": 0.5}
    seen.clear()
    causal_attention(q, q, q, kernel, documents=documents)
    assert seen == {}  # neither FlashAttention 3 nor torch knows the word


def test_one_mask_serves_the_backward_pass_of_every_block():
    """A boolean one would be kept once per block, 30 x 64 MiB for 8 rows of 2048 tokens in bf16."""
    model, kept = built(section(LLAMA)), set()

    def keep(x: Tensor) -> Tensor:
        if x.shape[-2:] == (24, 24):
            kept.add(x.data_ptr())
        return x

    ids, alive = torch.zeros(1, 24, dtype=torch.long), []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        alive.append(model(ids, ids, positions_BT=positions_of([[5, 19]])))
    assert len(kept) == 1


# ---- the decoder


def perturbed(shape: dict[str, Any], **options: Any) -> Decoder:
    """With weights so large that every part matters."""
    model, g = built(section(shape), **options), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    return model


def drawn(layout: Layout) -> tuple[Tensor, Tensor]:
    """Ids and labels for these rows; some labels are ignored."""
    g = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(61, (2, len(layout), sum(layout[0])), generator=g)
    return ids, labels.masked_fill(torch.rand(labels.shape, generator=g) < 0.1, -100)


Results = tuple[Tensor, Tensor, dict[str, Tensor]]  # logits, summed loss, gradients per valid token


def one_by_one(model: LanguageModel, ids: Tensor, labels: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The logits, and the summed loss, of all documents, each run alone in a row of its own."""
    logits, loss = [], torch.zeros(())
    for row, lengths in enumerate(layout):
        of_row = torch.cat([model(document[None])[0] for document in ids[row].split(lengths)])
        logits.append(of_row)
        loss = loss + F.cross_entropy(of_row, labels[row], reduction="sum")  # -100 is no label
    return torch.stack(logits), loss


def run_documents(model: LanguageModel, layout: Layout, *, packed: bool) -> Results:
    """Gradients per valid token, as a step divides the summed loss by their number."""
    ids, labels = drawn(layout)
    model.zero_grad()
    if packed:
        positions = positions_of(layout)
        logits, loss = model(ids, positions_BT=positions), model(ids, labels, positions_BT=positions)
    else:
        logits, loss = one_by_one(model, ids, labels, layout)
    (loss / (labels != -100).sum().clamp(min=1)).backward()
    return logits.detach(), loss.detach(), {n: g.clone() for n, g in gradients(model).items()}


@functools.cache
def run_alone(shape: str) -> Results:
    """The documents of LAYOUT one by one: the truth for every kernel, and for every way of gradient checkpointing."""
    return run_documents(perturbed(SHAPES[shape]), LAYOUT, packed=False)


def assert_same(found: Results, expected: Results, atol: float = 1e-5) -> None:
    (ours, loss, grads), (want, wanted_loss, truth) = found, expected
    torch.testing.assert_close(ours, want, rtol=0, atol=atol)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=atol)
    assert set(grads) == set(truth)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, truth[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_packed_is_alone(model: LanguageModel, layout: Layout) -> None:
    assert_same(run_documents(model, layout, packed=True), run_documents(model, layout, packed=False))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", ["sdpa", "math", "flash2"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_packed_documents_are_those_documents_one_by_one(
    shape: str, kernel: str, checkpointing: Literal["none", "full"]
):
    model = perturbed(SHAPES[shape], attention=KERNELS[kernel], gradient_checkpointing=checkpointing)
    found = run_documents(model, LAYOUT, packed=True)
    assert_same(found, run_alone(shape))
    assert set(found[2]) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("shape", [LLAMA, pytest.param(GPT2, marks=pytest.mark.slow)], ids=["llama", "gpt2"])
@settings(max_examples=25)
@given(layout=layouts())
def test_so_they_are_however_rows_are_cut(shape: dict[str, Any], layout: Layout):
    assert_packed_is_alone(perturbed(shape), layout)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_positions_a_row_is_one_text(shape: dict[str, Any]):
    model, (ids, _) = perturbed(shape), drawn(LAYOUT)
    plain, packed = model(ids), model(ids, positions_BT=positions_of(LAYOUT))
    torch.testing.assert_close(plain[0], packed[0], rtol=0, atol=1e-5)  # that row is one document
    assert (plain[1, 2:] - packed[1, 2:]).abs().max() > 0.1
    assert torch.equal(model(ids, positions_BT=positions_of(LAYOUT), last_only=True), packed[:, -1:])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_number_of_packed_documents(dropout: float):
    runs, (ids, labels) = [], drawn(LAYOUT)
    for mode in ("none", "full"):
        model = built(section(LLAMA, dropout=dropout, attention_dropout=dropout), gradient_checkpointing=mode)
        with torch.random.fork_rng():
            torch.manual_seed(3)  # the dropout masks
            loss = model(ids, labels, positions_BT=positions_of(LAYOUT))
            loss.backward()
        runs.append((loss, gradients(model)))
    (plain, plain_gradients), (loss, grads) = runs
    assert torch.equal(loss, plain)
    assert all(torch.equal(grads[name], x) for name, x in plain_gradients.items())


def varlen_traced(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, T: int, S: int) -> Tensor:
    """Called as the kernels of flash-attn and torch are, of the same shapes, and seen by the compiler."""
    groups = q.size(1) // k.size(1)
    return q + (k + v).repeat_interleave(groups, 1) + 0 * starts.sum() + 0 * (T + S)


@pytest.mark.parametrize(
    ("kernel", "region"),
    [
        ("varlen", "block"),
        ("blocked", "block"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("varlen", "model"), ("sdpa", "model"))),
    ],
)
def test_any_number_of_documents_is_one_graph(kernel: Any, region: str, monkeypatch: pytest.MonkeyPatch):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()  # the code that other tests in this process have left counts too
    counter = CompileCounter()
    for function in (decoder._run_decoder_block, decoder._run_blocks_and_norm):
        compiled = torch.compile(function.function, dynamic=False, backend=counter)
        monkeypatch.setitem(function.__dict__, "compiled", compiled)
    by_places = AttentionKernel("sdpa", "", varlen=varlen_traced)
    attention = by_places if kernel == "varlen" else AttentionKernel(kernel, "")
    shape = section(LLAMA, max_position_embeddings=64)
    model = built(shape, attention=attention, compiles=True, compile_region=region)
    g = torch.Generator().manual_seed(0)
    numbers: set[int | None] = set()
    for mean_length in range(3, 31):
        ids = torch.randint(mean_length, (2, 65), generator=g, dtype=torch.int32)
        batch = Batch(ids, separator_id=0).to(torch.device("cpu"))
        numbers.add(batch.num_documents)
        model(batch.ids_BT, batch.labels_BT, **batch.document_arguments()).backward()
    assert len(numbers) > 16, "twice as many shapes as torch makes code for"
    assert counter.frame_count == 1


def test_a_cache_continues_one_text():
    model = built(section(LLAMA))
    with pytest.raises(AssertionError, match="not packed documents"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=model.new_cache(1, 2), positions_BT=positions_of([[1, 1]]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "llama-untied-biases", "llama-mqa"])
def test_llama_of_transformers_masks_and_counts_as_we_do(name: str, attention: str):
    ours = perturbed(SHAPES[name])
    theirs = llama(ours.section)
    theirs.set_attn_implementation(attention)
    missing = theirs.load_state_dict(as_llama(ours.state_dict()), strict=False)
    assert not missing.unexpected_keys
    (ids, labels), positions = drawn(LAYOUT), positions_of(LAYOUT)
    valid = (labels != -100).sum()
    wanted = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours(ids, positions_BT=positions), wanted, rtol=0, atol=1e-5)
    (ours(ids, labels, positions_BT=positions) / valid).backward()
    F.cross_entropy(wanted.flatten(0, 1), labels.flatten()).backward()
    truth = gradients(theirs)
    for weight, gradient in as_llama(gradients(ours)).items():
        torch.testing.assert_close(gradient, truth[weight], rtol=0, atol=1e-5)


def test_a_bf16_model_masks_in_bf16():
    model, (ids, _) = perturbed(LLAMA).bfloat16(), drawn(LAYOUT)
    changed = ids.clone()
    changed[1, :9] = (changed[1, :9] + 1) % 61
    before, after = (model(x, positions_BT=positions_of(LAYOUT)) for x in (ids, changed))
    assert torch.equal(before[1, 9:], after[1, 9:])
    assert not torch.equal(before[1, :9], after[1, :9])


@pytest.mark.parametrize("by", ["step", "micro_batch"])
def test_the_engine_hands_the_positions_on(by: str):
    from smoltrain.engine.deepspeed_steps import DeepSpeedSteps
    from smoltrain.engine.engine import Engine
    from smoltrain.engine.once_per_step import OncePerStep

    engine, passed = object.__new__(Engine), []
    steps = object.__new__(OncePerStep if by == "step" else DeepSpeedSteps)

    class Wrapped(SimpleNamespace):
        def __call__(self, *args: Any, **options: Any) -> Tensor:
            passed.append((*args, options))
            return torch.zeros(())

    engine._deepspeed, engine._steps = Wrapped(device=torch.device("cpu"), module=Wrapped()), steps
    steps._deepspeed = engine._deepspeed
    rows = torch.tensor([[4, 0, 5, 6], [7, 8, 0, 9]], dtype=torch.int32)
    engine.forward(Batch(rows, separator_id=0))
    engine.forward(Batch(rows))
    (masked_ids, masked_labels, options), (ids, labels, none) = passed
    assert masked_ids.equal(ids)
    assert ids.equal(rows[:, :-1].long())
    assert (masked_labels.tolist(), labels.tolist()) == ([[0, -100, 6], [8, 0, -100]], [[0, 5, 6], [8, 0, 9]])
    assert options.pop("positions_BT").tolist() == [[0, 1, 0], [0, 1, 2]]
    assert options == {"num_documents": 3}
    assert none == {}
