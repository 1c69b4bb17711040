"""Whole matrices out of the parts that ZeRO cuts them into, and back: one rank, its owner, has each of them whole.

Each rank holds slices of matrices in flat tensors (reshard.ParameterSlice). A matrix that one rank alone holds whole
is that rank's. Any other has an owner to which the ranks send their slices, and which sends back what the slices are
after the work; owners are chosen so that all ranks have about as much to do. Under ZeRO-1 and ZeRO-2 a matrix is cut
only where two ranks meet; under ZeRO-3 all are cut among all ranks; under ZeRO-0 every rank holds all of them, so that
nothing is sent before the work, and all after it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smoltrain.distributed.world import World
from smoltrain.engine.reshard import ParameterSlice

BATCH_ELEMENTS = 2**24  # of the matrices that are worked on at once: as many as a GPU needs to be busy, 64 MiB

Work = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class MatrixPlan:
    """Who owns which matrix, and which slices go from rank to rank. Every rank makes the same plan."""

    shapes: dict[str, tuple[int, int]]
    slices: tuple[tuple[ParameterSlice, ...], ...]  # of each rank
    whole_on: dict[str, frozenset[int]]  # the ranks that hold a matrix whole
    owners: dict[str, int]

    def owned_by(self, rank: int) -> list[str]:
        """The matrices that a rank works on."""
        return [name for name, owner in self.owners.items() if owner == rank]

    def lacks_elements(self, name: str) -> bool:
        """Whether the owner of a matrix does not hold it whole."""
        return self.owners[name] not in self.whole_on[name]

    def slices_to_owner(self, sender: int, owner: int) -> list[ParameterSlice]:
        """What `sender` holds of the matrices that `owner` owns and does not hold whole."""
        return [piece for piece in self.slices_from_owner(owner, sender) if self.lacks_elements(piece.name)]

    def slices_from_owner(self, owner: int, receiver: int) -> list[ParameterSlice]:
        """What `receiver` holds of the matrices that `owner`, another rank, owns."""
        if receiver == owner:
            return []
        return [piece for piece in self.slices[receiver] if self.owners[piece.name] == owner]

    @property
    def has_foreign_slices(self) -> bool:
        """Whether any rank holds a slice of a matrix that another one owns."""
        return any(self.owners[piece.name] != rank for rank, pieces in enumerate(self.slices) for piece in pieces)


def plan_matrices(
    shapes: Mapping[str, tuple[int, int]], slices: Sequence[Sequence[ParameterSlice]], cost: Callable[[int, int], float]
) -> MatrixPlan:
    """Owners of matrices of these shapes, of which each rank holds these slices.

    `cost` of (rows, columns), alike on every rank. What is left after the matrices that one rank alone holds whole
    goes, the costliest first, to the rank that has least to do (Graham 1969), and among equals to the one that holds
    most of it.
    """
    costs = {name: cost(rows, columns) for name, (rows, columns) in shapes.items()}
    held: dict[str, dict[int, int]] = {name: {} for name in shapes}  # elements by rank
    for rank, pieces in enumerate(slices):
        for piece in pieces:
            held[piece.name][rank] = piece.stop - piece.first
    whole_on: dict[str, frozenset[int]] = {}
    for name, (rows, columns) in shapes.items():
        whole_on[name] = frozenset(rank for rank, size in held[name].items() if size == rows * columns)

    owners = {name: next(iter(ranks)) for name, ranks in whole_on.items() if len(ranks) == 1}
    loads = [0.0] * len(slices)
    for name, owner in owners.items():
        loads[owner] += costs[name]
    left = [name for name in shapes if name not in owners]
    for name in sorted(left, key=lambda name: -costs[name]):  # equals stay in their order
        held_here = held[name]
        owner = min(range(len(loads)), key=lambda rank: (loads[rank], -held_here.get(rank, 0), rank))
        owners[name] = owner
        loads[owner] += costs[name]
    in_order = {name: owners[name] for name in shapes}
    return MatrixPlan(dict(shapes), tuple(tuple(pieces) for pieces in slices), whole_on, in_order)


class MatrixExchange:
    """Carries a plan out on this rank."""

    def __init__(self, plan: MatrixPlan, world: World | None = None) -> None:
        """`world`: None for a plan of one rank."""
        self._plan = plan
        self._world = world
        self._rank = 0 if world is None else world.rank
        ranks = range(len(plan.slices))
        # Every rank must know whether any two exchange something: a collective takes all of them.
        self._gathers = any(plan.lacks_elements(name) for name in plan.shapes)
        self._returns = plan.has_foreign_slices
        # Those of the same sides follow each other: as many as can be are multiplied at once.
        self._owned = sorted(plan.owned_by(self._rank), key=lambda name: sorted(plan.shapes[name]))
        self._to_owner = [plan.slices_to_owner(self._rank, owner) for owner in ranks]
        self._from_holder = [plan.slices_to_owner(sender, self._rank) for sender in ranks]
        self._to_holder = [plan.slices_from_owner(self._rank, receiver) for receiver in ranks]
        self._from_owner = [plan.slices_from_owner(owner, self._rank) for owner in ranks]
        self._own_slices = [piece for piece in plan.slices[self._rank] if plan.owners[piece.name] == self._rank]

    def replace_matrices(self, tensors: Sequence[Tensor], work: Work) -> None:
        """Put in the place of each matrix in the flat `tensors` what `work` makes of it whole. Collective."""
        matrices = self._gather(tensors)
        batch: list[Tensor] = []
        for matrix in matrices.values():
            if batch and sum(x.numel() for x in batch) + matrix.numel() > BATCH_ELEMENTS:
                _replace(batch, work)
                batch = []
            batch.append(matrix)
        _replace(batch, work)
        self._return(tensors, matrices)

    def _gather(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The matrices that this rank owns: a view where `tensors` have it whole."""
        matrices: dict[str, Tensor] = {}
        for name in self._owned:
            if self._plan.lacks_elements(name):
                matrices[name] = tensors[0].new_empty(self._plan.shapes[name])
        for piece in self._own_slices:
            here = _elements(tensors, piece)
            if piece.name in matrices:
                matrices[piece.name].view(-1)[piece.first : piece.stop] = here
            else:
                matrices[piece.name] = here.view(self._plan.shapes[piece.name])
        if self._gathers:
            sent = [[_elements(tensors, piece) for piece in pieces] for pieces in self._to_owner]
            self._exchange(sent, [[_within(matrices, piece) for piece in pieces] for pieces in self._from_holder])
        return {name: matrices[name] for name in self._owned}

    def _return(self, tensors: Sequence[Tensor], matrices: Mapping[str, Tensor]) -> None:
        """Put the matrices where their slices came from."""
        for piece in self._own_slices:
            if self._plan.lacks_elements(piece.name):
                _elements(tensors, piece).copy_(_within(matrices, piece))
        if self._returns:
            sent = [[_within(matrices, piece) for piece in pieces] for pieces in self._to_holder]
            self._exchange(sent, [[_elements(tensors, piece) for piece in pieces] for pieces in self._from_owner])

    def _exchange(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Send to each rank its flat tensors, and fill those that come from each rank. Collective."""
        assert self._world is not None
        ours = [numbers for to_rank in sent for numbers in to_rank]
        theirs = [numbers for from_rank in received for numbers in from_rank]
        nothing = torch.empty(0, dtype=torch.float32, device=self._world.device)
        outgoing = torch.cat([nothing, *ours])
        sent_sizes = [sum(numbers.numel() for numbers in to_rank) for to_rank in sent]
        received_sizes = [sum(numbers.numel() for numbers in from_rank) for from_rank in received]
        incoming = nothing.new_empty(sum(received_sizes))
        self._world.all_to_all(incoming, outgoing, received_sizes, sent_sizes)
        for numbers, came in zip(theirs, incoming.split([numbers.numel() for numbers in theirs]), strict=True):
            numbers.copy_(came)


def _replace(matrices: list[Tensor], work: Work) -> None:
    if matrices:
        # One kernel on a GPU, not one for each matrix.
        torch._foreach_copy_(matrices, work(matrices))  # pyright: ignore[reportPrivateImportUsage]


def _elements(tensors: Sequence[Tensor], piece: ParameterSlice) -> Tensor:
    """A slice where this rank holds it."""
    return tensors[piece.tensor][piece.offset : piece.offset + piece.stop - piece.first]


def _within(matrices: Mapping[str, Tensor], piece: ParameterSlice) -> Tensor:
    """A slice where its owner has the whole matrix."""
    return matrices[piece.name].view(-1)[piece.first : piece.stop]
