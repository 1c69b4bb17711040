"""Orthogonalising matrices by Newton-Schulz iterations, which is what Muon does to each update (Jordan et al. 2024).

One iteration takes X to aX + b(XX')X + c(XX')^2 X: a polynomial a s + b s^3 + c s^5 of each singular value s, and the
singular vectors stay. Its coefficients have the steepest slope at zero: after five iterations every singular value
that began above 0.002 of the matrix's norm lies within [0.68, 1.21], which training cannot tell from 1, and a smaller
one has grown 485 times. A GPU computes it as it stands there, many matrices at once. A CPU computes the same polynomial
in an order with fewer operations:

- Only the shorter side matters. With G = XX', an iteration multiplies X by P = aI + bG + cG^2, and G becomes PGP.
  All of these are polynomials of the first G and commute, so that the P of all iterations can be multiplied with each
  other first, m x m, and X by their product Q once, at the end.
- All of these matrices are symmetric, so that of each only the blocks on and above the diagonal are multiplied.

G has the squares of the singular values. What they lose by rounding grows with each iteration, until small ones are
wrong or G has negative eigenvalues, with which the iteration diverges: so G is computed anew from X before that.

Legend: m the shorter side of a matrix, n the longer; G, P, Q, W are m x m and symmetric.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from smoltrain.kernels.precision import DTYPES, find_fastest_precision

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon, as torch.optim.Muon
SMALLEST_NORM = 1e-7  # what a matrix of zeros is divided by, as torch.optim.Muon

# On a CPU; each was measured by `python -m benchmarks.optimizer`, see docs/performance.md.
ITERATIONS_OF_ONE_GRAM = {torch.float32: 5, torch.bfloat16: 2}  # more, and the result is off by more than torch's own
GRAM_ASPECT = 1.5  # n / m from which multiplying the P first pays
NUM_BLOCKS = 8  # at most, of the rows of a symmetric product; the blocks of the triangle are then 9/16 of the square
MIN_BLOCK_ROWS = 96  # smaller blocks gain less than they cost
MIN_ROWS = 384  # nor do blocks of a smaller matrix gain anything

STACKED_ELEMENTS = 2**26  # on a GPU at most at once; five tensors of that size are alive


@torch.no_grad()
def orthogonalize(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """The nearest semi-orthogonal matrices, roughly: the same singular vectors, all singular values near 1.

    Each is fp32 and of any shape A x B, all on one device; so are the results. They differ from the exact polynomial
    by no more than torch.optim.Muon's own, which computes in bf16.
    """
    if not matrices:
        return []
    device = matrices[0].device
    dtype, _ = choose_dtype(device)
    if device.type != "cpu":
        return _orthogonalize_stacks(matrices, steps, dtype)
    buffers: dict[int, list[Tensor]] = {}  # by m; allocated for every product they took a tenth of the time
    results = []
    for matrix in matrices:
        m = min(matrix.shape)
        if m not in buffers:
            buffers[m] = [torch.empty(m, m, dtype=dtype) for _ in range(4)]
        results.append(_orthogonalize_one(matrix, steps, buffers[m]))
    return results


def choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of the products, reason): bf16 where the device multiplies it faster than fp32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16, this GPU computes it"
        return torch.float32, "fp32, this GPU has no bf16"
    name, reason = find_fastest_precision()
    return DTYPES[name], f"{name}, {reason}"


def newton_schulz_flops(rows: int, columns: int, steps: int, dtype: torch.dtype | None = None) -> int:
    """FLOPs of the products for one matrix: those of the definition, as a GPU computes it.

    With a dtype those of the order in which a CPU computes in that dtype.
    """
    m = min(rows, columns)
    n = max(rows, columns)
    if dtype is None:
        return steps * (4 * m * m * n + 2 * m * m * m)
    edges = _block_edges(m)
    triangle = sum((bottom - top) * (m - top) for top, bottom in pairwise(edges))
    flops = 0
    for iterations in _split_iterations(m, n, steps, dtype):
        num_symmetric_products = 4 * iterations - 3
        flops += 2 * triangle * n + num_symmetric_products * 2 * triangle * m + 2 * m * m * n
    return flops


def _orthogonalize_stacks(matrices: Sequence[Tensor], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """By the definition, matrices of the same two sides in one product, whichever is the longer: few launches."""
    places_by_sides: dict[tuple[int, ...], list[int]] = {}
    for place, matrix in enumerate(matrices):
        places_by_sides.setdefault(tuple(sorted(matrix.shape)), []).append(place)
    results: dict[int, Tensor] = {}
    for (m, n), places in places_by_sides.items():
        places.sort(key=lambda place: matrices[place].size(0))  # the wide ones first
        num_at_once = max(1, STACKED_ELEMENTS // (m * n))
        for start in range(0, len(places), num_at_once):
            chosen = places[start : start + num_at_once]
            stack = _orthogonalize_stack([matrices[place] for place in chosen], steps, dtype)
            results.update(zip(chosen, stack, strict=True))
    return [results[place] for place in range(len(matrices))]


def _orthogonalize_stack(matrices: list[Tensor], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the same two sides, the wide ones first; a tall one is iterated as its transpose."""
    a, b, c = COEFFICIENTS
    m, n = sorted(matrices[0].shape)
    wide = [matrix for matrix in matrices if matrix.size(0) == m]
    tall = matrices[len(wide) :]
    X = matrices[0].new_empty(len(matrices), m, n, dtype=dtype)
    _stack_normalized(wide, X[: len(wide)])
    _stack_normalized(tall, X[len(wide) :].mT)
    for _ in range(steps):
        G = torch.bmm(X, X.mT)
        W = torch.baddbmm(G, G, G, beta=b, alpha=c)
        X = torch.baddbmm(X, W, X, beta=a)
    results: list[Tensor] = []
    for place in (X[: len(wide)], X[len(wide) :].mT):
        if len(place):
            results += torch.empty(place.shape, device=X.device).copy_(place).unbind()
    return results


def _stack_normalized(matrices: list[Tensor], out: Tensor) -> None:
    """Each over its norm, rounded to the dtype of `out` on its way."""
    if matrices:
        stack = torch.stack(matrices)
        norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True)
        torch.div(stack, norms.clamp_(min=SMALLEST_NORM), out=out)


def _orthogonalize_one(matrix: Tensor, steps: int, buffers: list[Tensor]) -> Tensor:
    """On a CPU. `buffers` are four of m x m, whose dtype is that of the products; what stands in them is lost."""
    a, _, _ = COEFFICIENTS
    G, W, _, _ = buffers
    is_tall = matrix.size(0) > matrix.size(1)
    X = (matrix / matrix.norm().clamp(min=SMALLEST_NORM)).to(G.dtype)
    for iterations in _split_iterations(min(matrix.shape), max(matrix.shape), steps, G.dtype):
        if is_tall:
            _multiply_symmetric(X.T, X, out=G)
        else:
            _multiply_symmetric(X, X.T, out=G)
        if iterations == 1:
            _make_polynomial(G, out=W)
            X = torch.addmm(X, X, W, beta=a) if is_tall else torch.addmm(X, W, X, beta=a)
        else:
            Q = _multiply_polynomials(buffers, iterations)
            X = X @ Q if is_tall else Q @ X
    return X.float()


def _split_iterations(m: int, n: int, steps: int, dtype: torch.dtype) -> list[int]:
    """How many iterations are computed on each G: about the same number, the largest first."""
    most = ITERATIONS_OF_ONE_GRAM[dtype] if n >= GRAM_ASPECT * m else 1
    num_grams = -(-steps // most)
    return [steps // num_grams + (i < steps % num_grams) for i in range(num_grams)]


def _multiply_polynomials(buffers: list[Tensor], iterations: int) -> Tensor:
    """The product of all iterations' P = aI + W; the first buffer is the first iteration's G."""
    a, _, _ = COEFFICIENTS
    G, W, spare, Q = buffers
    for iteration in range(iterations):
        _make_polynomial(G, out=W)
        if iteration < iterations - 1:
            _multiply_symmetric(W, G, out=spare, plus=G, beta=a)  # PG
            _multiply_symmetric(W, spare, out=G, plus=spare, beta=a)  # PPG, which is PGP
        if iteration == 0:
            Q.copy_(W).diagonal().add_(a)
        else:
            _multiply_symmetric(W, Q, out=spare, plus=Q, beta=a)
            before = Q
            Q = spare
            spare = before
    return Q


def _make_polynomial(G: Tensor, *, out: Tensor) -> None:
    """W = bG + cG^2, which is P without aI."""
    _, b, c = COEFFICIENTS
    _multiply_symmetric(G, G, out=out, plus=G, beta=b, alpha=c)


def _multiply_symmetric(
    left: Tensor, right: Tensor, *, out: Tensor, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """out = beta x plus + alpha x left @ right, which is known to be symmetric: its upper triangle, then mirrored."""
    for top, bottom in pairwise(_block_edges(len(out))):
        block = out[top:bottom, top:]
        if plus is None:
            torch.mm(left[top:bottom], right[:, top:], out=block)
        else:
            terms = (plus[top:bottom, top:], left[top:bottom], right[:, top:])
            torch.addmm(*terms, beta=beta, alpha=alpha, out=block)
        out[bottom:, top:bottom] = block[:, bottom - top :].T


def _block_edges(m: int) -> list[int]:
    """Where the rows of a symmetric product are cut."""
    num_blocks = min(NUM_BLOCKS, m // MIN_BLOCK_ROWS) if m >= MIN_ROWS else 1
    return [m * i // num_blocks for i in range(num_blocks + 1)]
