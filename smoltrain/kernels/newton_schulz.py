"""Orthogonalising matrices by Newton-Schulz iterations, which is what Muon does to each update (Jordan et al. 2024).

One iteration takes X to aX + b(XX')X + c(XX')^2 X: a polynomial a s + b s^3 + c s^5 of each singular value s, and the
singular vectors stay. Its coefficients have the steepest slope at zero: after five iterations all singular values but
the smallest lie within about [0.7, 1.2], which training cannot tell from 1.

Legend: m the shorter side of a matrix, n the longer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon, as torch.optim.Muon
SMALLEST_NORM = 1e-7  # what a matrix of zeros is divided by, as torch.optim.Muon


@torch.no_grad()
def orthogonalize(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """The nearest semi-orthogonal matrices, roughly: the same singular vectors, all singular values near 1.

    Each is fp32 and of any shape A x B, all on one device; so are the results. Equal shapes are batched on a GPU.
    """
    if not matrices:
        return []
    dtype, _ = choose_dtype(matrices[0].device)
    return [_orthogonalize_one(matrix, steps, dtype) for matrix in matrices]


def choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of the products, reason). The iterations are made for bf16: see the module."""
    return torch.bfloat16, f"bf16, on {device.type}"


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """FLOPs of one matrix: an iteration has two products with n (XX' and its use) and one square of m x m."""
    m = min(rows, columns)
    n = max(rows, columns)
    return steps * (4 * m * m * n + 2 * m * m * m)


def _orthogonalize_one(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    X = matrix.to(dtype, copy=True)
    if is_tall:
        X = X.T
    X.div_(X.norm().clamp(min=SMALLEST_NORM))
    for _ in range(steps):
        gram = X @ X.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.addmm(X, polynomial, X, beta=a)
    if is_tall:
        X = X.T
    return X.float().contiguous()
