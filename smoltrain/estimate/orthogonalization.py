"""What Muon's orthogonalisation costs beside an elementwise update: memory, operations, bytes read and sent.

Legend: H elements of all hidden matrices, of which a rank holds the share h (H / W from ZeRO-1 on); m x n the sides of
one, m the shorter; b bytes of a number in the Newton-Schulz iterations; otherwise as memory.py.
"""

import math
from collections import Counter

import torch

from smoltrain.engine.matrix_exchange import BATCH_ELEMENTS
from smoltrain.engine.optimizer_kind import FP32_BYTES
from smoltrain.estimate.training_setup import TrainingSetup
from smoltrain.kernels.newton_schulz import choose_dtype, newton_schulz_flops

# Bytes an element that are read and written beside one pass each before and after: the cast, the result, its scale, and
# its way back (engine/muon.py: orthogonalize_updates, engine/matrix_exchange.py: replace_matrices).
TRAFFIC_BYTES = 28


def orthogonalization_temporary_bytes(setup: TrainingSetup) -> float:
    """Of a rank, at the fullest; 0 where nothing is orthogonalised."""
    if not setup.newton_schulz_steps:
        return 0.0
    at_once = _exchange_buffer_bytes(setup) + _iteration_bytes(setup)
    return _update_bytes(setup) + max(at_once, _masked_bytes(setup))


def orthogonalization_operations(setup: TrainingSetup) -> float:
    """Of one rank and update, as this device multiplies; the ranks share the matrices by what these cost."""
    steps = setup.newton_schulz_steps
    dtype = iteration_dtype(setup) if setup.device == "cpu" else None
    flops = sum(newton_schulz_flops(rows, columns, steps, dtype) for rows, columns in setup.shape.hidden_matrices)
    return flops / setup.world if steps else 0.0


def orthogonalization_traffic_bytes(setup: TrainingSetup) -> float:
    """Read and written by one rank and update, matrix products aside."""
    if not setup.newton_schulz_steps:
        return 0.0
    return TRAFFIC_BYTES * setup.shape.hidden_parameters / setup.world


def orthogonalization_sent_bytes(setup: TrainingSetup) -> float:
    """Sent by one rank and update, so that each matrix is whole on its owner, and its parts are back where they were.

    ZeRO-0 sends what comes out to all others; ZeRO-1 and 2 both ways the matrix that the border of a rank cuts; ZeRO-3
    both ways nearly all that the rank holds.
    """
    W = setup.world
    if not setup.newton_schulz_steps or W == 1:
        return 0.0
    part = FP32_BYTES * setup.shape.hidden_parameters / W
    if setup.stage == 0:
        return part * (W - 1)
    if setup.stage == 3:
        return 2 * part * (W - 1) / W
    return FP32_BYTES * setup.shape.largest_matrix


def iteration_dtype(setup: TrainingSetup) -> torch.dtype:
    """In which the iterations are computed; every GPU of constants.py computes bf16."""
    return torch.bfloat16 if setup.device == "cuda" else choose_dtype(torch.device(setup.device))[0]


def count_stacks(setup: TrainingSetup) -> int:
    """Of matrices of the same two sides, which a rank's GPU multiplies at once, in an update."""
    elements: Counter[tuple[int, ...]] = Counter()
    for sides in setup.shape.hidden_matrices:
        elements[tuple(sorted(sides))] += math.prod(sides)
    share = _held_elements(setup) / setup.shape.hidden_parameters
    return sum(math.ceil(share * size / BATCH_ELEMENTS) for size in elements.values())


def _update_bytes(setup: TrainingSetup) -> float:
    """The updates of all matrices of a rank, 4h, where they do not take the place of the gradients' sums in fp32.

    DeepSpeed makes a flat copy of its gradients for an update.
    """
    in_place = setup.once_per_step and setup.gradient_sum_bytes == FP32_BYTES
    return 0.0 if in_place else FP32_BYTES * _held_elements(setup)


def _masked_bytes(setup: TrainingSetup) -> float:
    """What takes the old numbers' place if the update is allowed: of momentum, then of masters. 4h on a GPU.

    A compiled loop needs none, and a host that waits for the verdict does not either.
    """
    masks = setup.once_per_step and not setup.compiled_update and setup.device == "cuda"
    return FP32_BYTES * _held_elements(setup) if masks else 0.0


def _exchange_buffer_bytes(setup: TrainingSetup) -> float:
    """What was cut, whole; what is sent, and what comes."""
    W = setup.world
    if W == 1:
        return 0.0
    H = setup.shape.hidden_parameters
    if setup.stage == 0:  # what a rank has worked on goes to all others, theirs come
        return FP32_BYTES * 2 * H * (W - 1) / W
    if setup.stage == 3:
        return FP32_BYTES * (H / W) * (1 + 2 * (W - 1) / W)
    return FP32_BYTES * 2 * setup.shape.largest_matrix  # half of it is sent by one rank, and comes to the other


def _iteration_bytes(setup: TrainingSetup) -> float:
    """The results, of as many matrices as are worked on at once, and what the iterations themselves allocate.

    On a CPU for one matrix after the other: X, b mn, and four squares, b mm, for each m that there is. On a GPU for all
    of the same two sides: X in b beside their stack in fp32, 4s, and later beside the result; between them X before and
    after an iteration with two squares.
    """
    b = iteration_dtype(setup).itemsize
    matrices = setup.shape.hidden_matrices
    largest = setup.shape.largest_matrix
    at_once = max(min(BATCH_ELEMENTS, _held_elements(setup)), largest)
    results = FP32_BYTES * at_once
    if setup.device == "cpu":
        return results + b * largest + 4 * b * sum(m * m for m in {min(sides) for sides in matrices})
    m, n = sorted(max(matrices, key=lambda sides: sides[0] * sides[1]))
    stack = min(at_once, sum(rows * columns for rows, columns in matrices if sorted((rows, columns)) == [m, n]))
    squares = stack * m / n
    return results - FP32_BYTES * stack + max((FP32_BYTES + b) * stack, 2 * b * (stack + squares))


def _held_elements(setup: TrainingSetup) -> float:
    return setup.shape.hidden_parameters / (setup.world if setup.stage else 1)
