"""Attention in blocks is attention: output, gradients, dropout, documents; and it keeps no more than it says."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoltrain.kernels import cpu_attention
from smoltrain.kernels.attention import AttentionKernel, PackedDocuments, causal_attention
from smoltrain.kernels.cpu_dropout import NUM_LEVELS
from tests.model.tiny_decoders import GPT2, LLAMA, built, gradients, section

BLOCKED, SDPA, MATH = (
    AttentionKernel("blocked", "test"),
    AttentionKernel("sdpa", "test"),
    AttentionKernel("math", "test"),
)
RATE = 0.25


@pytest.fixture(params=[1024, 0], ids=["kept", "computed again"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 queries; their probabilities are kept for the backward pass, or not."""
    monkeypatch.setattr(cpu_attention, "QUERIES_PER_BLOCK", 8)
    monkeypatch.setattr(cpu_attention, "MAX_KEPT_LENGTH", request.param)


@pytest.fixture(autouse=True)
def same_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


Inputs = tuple[Tensor, Tensor, Tensor]


def qkv(B: int, H: int, K: int, T: int, E: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """In the memory order that a decoder's projections have."""
    q, k, v = (torch.randn(B, T, heads, E).to(dtype).transpose(1, 2).requires_grad_() for heads in (H, K, K))
    return q, k, v


def with_gradients(out: Tensor, inputs: Inputs) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights.to(out.dtype))]


def copies(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
    return q, k, v


def errors(inputs: Inputs, kernel: AttentionKernel) -> list[float]:
    """Of output, dq, dk, dv against fp64, norm over norm."""
    exact = copies(inputs, torch.float64)
    pairs = zip(
        with_gradients(causal_attention(*inputs, kernel), inputs),
        with_gradients(causal_attention(*exact, MATH), exact),
        strict=True,
    )
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@settings(max_examples=40)
@given(
    B=st.integers(1, 3),
    K=st.integers(1, 3),
    groups=st.integers(1, 3),
    T=st.integers(1, 35),
    E=st.sampled_from([1, 2, 7, 16]),
    ends=st.none() | st.sets(st.integers(1, 34)),
)
def test_it_is_attention(dtype: torch.dtype, rtol: float, B: int, K: int, groups: int, T: int, E: int, ends: Any):
    torch.manual_seed(0)
    ours = qkv(B, K * groups, K, T, E, dtype)
    exact, documents = copies(ours, torch.float64), [None, None]
    if ends is not None:
        starts = torch.tensor([0, *sorted(end for end in ends if end < T)])
        place = torch.arange(T)
        positions = (place - starts[torch.searchsorted(starts, place, right=True) - 1]).expand(B, T)
        documents = [PackedDocuments.from_positions(positions, BLOCKED, x) for x in (dtype, torch.float64)]
    out = causal_attention(*ours, BLOCKED, documents=documents[0])
    assert out.transpose(1, 2).is_contiguous()  # as the next projection wants it
    want = with_gradients(causal_attention(*exact, MATH, documents=documents[1]), exact)
    for a, b in zip(with_gradients(out, ours), want, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= rtol * (b.norm() + 1)


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("T", [128, 300, 512])
def test_in_bf16_it_is_no_worse_than_twice_sdpa(T: int, factor: int):
    """Also for scores with a deviation of 16, whose own rounding to bf16 would be 0.03."""
    q, k, v = qkv(1, 9, 3, T, 64, torch.bfloat16)
    q, k = ((x.detach() * factor).requires_grad_() for x in (q, k))
    inputs = (q, k, v)
    for ours, theirs in zip(errors(inputs, BLOCKED), errors(inputs, SDPA), strict=True):
        assert ours <= 2 * theirs


def test_in_bf16_gradients_of_many_blocks_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch):
    inputs = qkv(1, 1, 1, 512, 16, torch.bfloat16)
    few = errors(inputs, BLOCKED)
    monkeypatch.setattr(cpu_attention, "QUERIES_PER_BLOCK", 4)
    for many, one in zip(errors(inputs, BLOCKED), few, strict=True):
        assert many < 1.2 * one


def test_what_is_computed_again_is_the_same(monkeypatch: pytest.MonkeyPatch):
    inputs, results = qkv(2, 4, 2, 300, 16, torch.bfloat16), []
    for length in (300, 299):
        monkeypatch.setattr(cpu_attention, "MAX_KEPT_LENGTH", length)
        torch.manual_seed(5)
        results.append(with_gradients(causal_attention(*inputs, BLOCKED, dropout=0.1), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_keeps_the_probabilities_of_short_rows_only(monkeypatch: pytest.MonkeyPatch, dropout: float):
    inputs = qkv(2, 4, 2, 300, 16, torch.bfloat16)
    probabilities = 2 * 4 * (128 * 128 + 128 * 256 + 44 * 300)
    for length, more in ((300, probabilities), (299, 0)):
        monkeypatch.setattr(cpu_attention, "MAX_KEPT_LENGTH", length)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            alive = causal_attention(*inputs, BLOCKED, dropout=dropout)
        assert sum(kept) - (dropout > 0) == sum(x.numel() for x in inputs) + more
        del alive


# ---- dropout


def dropped_weights(q: Tensor, k: Tensor, dropout: float = RATE) -> Tensor:
    """The weights after dropout, [B, H, T, T], as the values are unit vectors."""
    assert q.size(2) == q.size(3)
    unit = torch.eye(q.size(2), dtype=q.dtype).expand_as(k)
    with torch.no_grad():
        return causal_attention(q, k, unit, BLOCKED, dropout=dropout)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("documents", [False, True])
def test_dropout_is_that_of_a_plain_implementation_with_the_same_mask(documents: bool):
    T = 21
    inputs = qkv(2, 6, 2, T, T)
    positions = torch.arange(T).remainder(13).expand(2, T)
    packed = PackedDocuments.from_positions(positions, BLOCKED, torch.float64) if documents else None
    state = torch.get_rng_state()
    ours = with_gradients(causal_attention(*inputs, BLOCKED, dropout=RATE, documents=packed), inputs)
    torch.set_rng_state(state)
    survives = dropped_weights(inputs[0], inputs[1]) > 0
    assert 0.65 < survives.double().sum() / survives.new_ones(survives.shape).tril().sum() < 0.85
    q, k, v = exact = copies(inputs, torch.float64)
    added = torch.full((T, T), float("-inf")).triu(1) if packed is None else packed.mask_B1TT
    assert added is not None
    weights = (q @ k.repeat_interleave(3, 1).mT / T**0.5 + added).softmax(-1)
    want = weights * survives / (1 - RATE) @ v.repeat_interleave(3, 1)
    for a, b in zip(ours, with_gradients(want, exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_so_many_weights_are_dropped_and_the_expectation_stays(rate: float):
    q, k, _ = qkv(4, 4, 4, 256, 256, torch.float32)
    q, k = torch.zeros_like(q), torch.zeros_like(k)  # all weights of a row are alike
    out = dropped_weights(q, k, rate)
    seen = torch.ones(256, 256, dtype=torch.bool).tril()
    survives = (out[..., seen] > 0).double()
    deviation = (rate * (1 - rate) / survives.numel()) ** 0.5
    assert abs(survives.mean() - (1 - rate)) < 5 * deviation + 1 / NUM_LEVELS
    mean = out.double().sum(-1).mean((0, 1))  # of 16 rows that would add up to 1
    assert abs(mean[128:].mean() - 1) < 5 * (rate / (1 - rate) / (16 * 128 * 192)) ** 0.5
    assert (out[..., ~seen] == 0).all()


def test_no_two_weights_share_their_fate():
    q, k, _ = qkv(2, 4, 2, 256, 256, torch.float32)
    first, second = dropped_weights(q, k, 0.5) > 0, dropped_weights(q, k, 0.5) > 0
    block = (first[..., 128:, :128].double() - 0.5) * 2
    others = {
        "another call": second[..., 128:, :128],
        "another row of the batch": first.roll(1, 0)[..., 128:, :128],
        "another head": first.roll(1, 1)[..., 128:, :128],
        "another query": first[..., 128:, :128].roll(1, 2),
        "another key": first[..., 128:, :128].roll(1, 3),
        "4 keys on, of another draw": first[..., 128:, :128].roll(4, 3),
    }
    for what, other in others.items():
        correlation = (block * (other.double() - 0.5) * 2).mean()
        assert abs(correlation) < 5 / block.numel() ** 0.5, what


def test_the_random_state_decides():
    inputs, state = qkv(1, 2, 1, 40, 8), torch.get_rng_state()
    first, second = (causal_attention(*inputs, BLOCKED, dropout=RATE) for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(causal_attention(*inputs, BLOCKED, dropout=RATE), first)
    assert not torch.equal(first, second)
    before = torch.get_rng_state()
    causal_attention(*inputs, BLOCKED)
    assert torch.equal(torch.get_rng_state(), before), "without dropout no number is drawn"


@pytest.mark.parametrize("dropout", [0.0, RATE])
def test_gradient_checkpointing_changes_no_bit(dropout: float):
    results = []
    inputs = qkv(2, 4, 2, 200, 16, torch.bfloat16)
    for recompute in (False, True):
        torch.manual_seed(3)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, k, v, BLOCKED, dropout=dropout)

        out = checkpoint(run, *inputs, use_reentrant=False) if recompute else run(*inputs)
        torch.manual_seed(4)  # what is drawn meanwhile
        results.append(with_gradients(out, inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- where it is called


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_decoder_trains_on_it_as_on_sdpa(shape: dict[str, Any], checkpointing: Any, packed: bool):
    model = built(section(shape), attention=BLOCKED, gradient_checkpointing=checkpointing)
    other = built(section(shape), attention=SDPA)
    other.load_state_dict(model.state_dict())
    ids, labels = torch.randint(61, (2, 2, 20))
    positions = torch.arange(20).remainder(7).expand(2, 20) if packed else None
    losses = [x(ids, labels, positions_BT=positions) for x in (model, other)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    truth = gradients(other)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, truth[name], rtol=0, atol=2e-5)


def test_it_runs_inside_what_is_compiled():
    inputs = qkv(1, 4, 2, 20, 8)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.silu(causal_attention(2 * q, k, v, BLOCKED)) + 1

    compiled = torch.compile(block, backend="aot_eager", dynamic=False, fullgraph=True)
    for ours, eager in zip(
        with_gradients(compiled(*inputs), inputs), with_gradients(block(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.usefixtures("small_blocks")
def test_nothing_that_it_is_given_changes():
    inputs = qkv(1, 4, 2, 20, 8)
    mask = torch.zeros(1, 1, 20, 20, dtype=torch.float64).masked_fill_(~torch.ones(20, 20).tril().bool(), -torch.inf)
    before = copy.deepcopy([x.detach() for x in (*inputs, mask)])
    out = cpu_attention.blocked_attention(*inputs, dropout=RATE, mask_B1TT=mask)
    dout = torch.ones_like(out)
    torch.autograd.grad(out, inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, mask), strict=True))
    assert (dout == 1).all()


def test_the_keys_of_a_cache_are_refused():
    q, k, v = qkv(1, 2, 1, 6, 8)
    with pytest.raises(AssertionError, match="the queries are those of a cache"):
        cpu_attention.blocked_attention(q[:, :, :3], k, v)


@pytest.mark.parametrize("keep", [True, False])
def test_torch_finds_the_operator_well_described(keep: bool):
    q, k, v = qkv(2, 4, 2, 20, 8)
    seed = torch.tensor(7)
    operator = torch.ops.smoltrain.blocked_attention.default
    torch.library.opcheck(operator, (q, k, v, None, seed, RATE, keep))
