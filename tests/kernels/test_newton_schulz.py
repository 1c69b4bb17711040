"""Newton-Schulz: as torch's Muon has it, and what must hold of any orthogonalisation."""

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from smoltrain.kernels.newton_schulz import COEFFICIENTS, choose_dtype, newton_schulz_flops, orthogonalize

SHAPES = [(64, 64), (48, 128), (128, 48), (1, 40), (40, 1), (33, 70)]


def draw_matrix(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def orthogonalize_as_torch(matrix: Tensor, steps: int = 5) -> Tensor:
    return _zeropower_via_newtonschulz(matrix, COEFFICIENTS, steps, 1e-7).float()


@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_torch_computes(shape: tuple[int, int], steps: int) -> None:
    matrix = draw_matrix(shape)
    (ours,) = orthogonalize([matrix], steps)
    assert torch.equal(ours, orthogonalize_as_torch(matrix, steps))
    assert torch.equal(matrix, draw_matrix(shape)), "the argument is left as it was"


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    (ours,) = orthogonalize([draw_matrix(shape)], 5)
    values = torch.linalg.svdvals(ours)
    assert ours.shape == shape
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert values.max() < 1.25
    assert values[: -len(values) // 4].min() > 0.65 if len(values) > 4 else values.min() > 0.65


def test_many_matrices_are_what_each_is_alone() -> None:
    matrices = [draw_matrix(shape) for shape in SHAPES + SHAPES]
    together = orthogonalize(matrices, 5)
    for matrix, ours in zip(matrices, together, strict=True):
        assert torch.equal(ours, orthogonalize([matrix], 5)[0])
    assert orthogonalize([], 5) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_stay_zeros(shape: tuple[int, int]) -> None:
    (ours,) = orthogonalize([torch.zeros(shape)], 5)
    assert torch.equal(ours, torch.zeros(shape))


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**40])
def test_the_scale_does_not_matter(scale: float) -> None:
    matrix = draw_matrix((48, 128))
    assert torch.equal(orthogonalize([matrix * scale], 5)[0], orthogonalize([matrix], 5)[0])


def test_flops_are_those_of_the_products() -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize_as_torch(torch.randn(48, 128), 3)
    assert newton_schulz_flops(48, 128, 3) == newton_schulz_flops(128, 48, 3) == counter.get_total_flops()


def test_the_dtype_has_a_reason() -> None:
    assert choose_dtype(torch.device("cpu"))[0] == torch.bfloat16
