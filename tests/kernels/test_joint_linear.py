"""Several layers of one input as one product: what each would make, and where their weights lie."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoltrain.kernels import joint_linear as module
from smoltrain.kernels.joint_linear import find_layers_apart, joint_linear, lie_side_by_side

WIDTHS = (12, 4, 4)


class Projections(nn.Module):
    """q, k and v; `flat`: with their weights, and their biases, end to end as ZeRO lays them."""

    def __init__(self, bias: bool, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, width, bias=bias) for width in WIDTHS)
        self.joint_layers = ((self.q_proj, self.k_proj, self.v_proj),)
        if flat:
            _lay_end_to_end([layer.weight for layer in self.joint_layers[0]])
            _lay_end_to_end([layer.bias for layer in self.joint_layers[0] if bias])


def _lay_end_to_end(parameters: list[Any]) -> None:
    if parameters:
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view_as(parameter)


def _run(layers: Projections, joint: bool) -> list[Tensor]:
    """Outputs, and the gradients of the input and of all parameters."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    outputs = joint_linear(x, layers.joint_layers[0]) if joint else [layer(x) for layer in layers.joint_layers[0]]
    wanted = [x, *(p for layer in layers.joint_layers[0] for p in layer.parameters())]
    loss = sum((out.square().sum() for out in outputs), torch.zeros(()))
    return [*outputs, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_it_is_each_layer_by_itself(bias: bool, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Projections(bias, flat)
    expected = _run(layers, joint=False)
    copied: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(module.torch, "cat", lambda parts: copied.append(len(parts)) or cat(parts))
    found = _run(layers, joint=True)
    assert len(found) == len(expected) == 3 + 1 + 3 * (1 + bias)
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)
    assert (copied == []) == flat, "weights that lie side by side are not copied"


def test_the_operator_keeps_torchs_rules() -> None:
    layers = Projections(bias=True, flat=True).joint_layers[0]
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    x = torch.randn(2, 5, 8, requires_grad=True)
    torch.library.opcheck(module.JOINT_LINEAR, (x, weights, biases))
    torch.library.opcheck(module.JOINT_LINEAR, (x, weights, []))


def test_layers_that_lie_apart_are_told_by_name() -> None:
    assert find_layers_apart(nn.Sequential(Projections(True, flat=True))) is None
    assert find_layers_apart(nn.Sequential(Projections(True, flat=False))) == "0.q_proj, 0.k_proj, 0.v_proj"
    buffer = torch.zeros(12)
    assert lie_side_by_side([buffer[:4], buffer[4:6], buffer[6:]])
    assert not lie_side_by_side([buffer[:4], buffer[5:]])
    assert not lie_side_by_side([buffer[4:], buffer[:4]])
    assert not lie_side_by_side([buffer[:0], buffer[:0]]), "ZeRO-3 leaves weights empty"
