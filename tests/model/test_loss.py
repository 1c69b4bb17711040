"""The loss is the sum over valid tokens, in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smoltrain.model.loss import IGNORED, summed_cross_entropy, summed_cross_entropy_of_logits


def case(tokens: int, ignored: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, 16, generator=g), torch.randn(50, 16, generator=g)
    labels = torch.randint(50, (tokens,), generator=g)
    labels[ignored] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize(("tokens", "ignored"), [(40, []), (40, [0, 7, 39]), (1, []), (513, [512])])
def test_it_is_the_sum_over_valid_tokens(tokens: int, ignored: list[int]):
    hidden, weight, labels = case(tokens, ignored)
    loss = summed_cross_entropy(hidden, weight, labels)
    valid = labels != IGNORED
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


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_valid_token_is_zero_with_zero_gradients(tokens: int):
    hidden, weight, labels = case(tokens, list(range(tokens)))
    loss = summed_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_bf16_weights_give_an_fp32_loss():
    hidden, weight, labels = case(512, [])
    loss = summed_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, summed_cross_entropy(hidden, weight, labels), rtol=2e-3, atol=0)
