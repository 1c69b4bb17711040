"""Every matrix has one owner, which sees it whole, and every slice comes back to where it was cut out."""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.config.load import load_config
from smoltrain.engine.hidden_matrices import split_parameters
from smoltrain.engine.matrix_exchange import MatrixExchange, MatrixPlan, plan_matrices
from smoltrain.engine.muon import plan_whole_matrices
from smoltrain.engine.reshard import ShardLayout, build_shard_layout
from smoltrain.kernels.newton_schulz import newton_schulz_flops, orthogonalize
from smoltrain.model.build import build_model

Sides = dict[str, tuple[int, int]]


def flops(rows: int, columns: int) -> int:
    return newton_schulz_flops(rows, columns, 5)


def layout_of(sides: Sides, stage: int, world_size: int, gaps: list[int] | None = None) -> ShardLayout:
    shapes = {name: torch.Size(shape) for name, shape in sides.items()}
    return build_shard_layout(stage, [shapes], None if gaps is None or stage == 3 else [gaps], world_size)


def plan_of(sides: Sides, layout: ShardLayout) -> MatrixPlan:
    slices = [list(layout.parameter_slices(rank)) for rank in range(layout.world_size)]
    return plan_matrices(sides, slices, flops)


class Mailbox:
    """Stands in for the Worlds of several ranks that are threads: what all_to_all of each has sent."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.sent: dict[int, list[torch.Tensor]] = {}

    def world(self, rank: int) -> Any:
        mailbox = self

        class ThreadWorld:
            device = torch.device("cpu")

            def __init__(self) -> None:
                self.rank = rank

            def all_to_all(
                self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
            ) -> None:
                mailbox.sent[rank] = list(sent.split(sent_sizes))
                mailbox.barrier.wait(20)
                came = [mailbox.sent[sender][rank] for sender in range(len(sent_sizes))]
                assert [len(x) for x in came] == received_sizes
                received.copy_(torch.cat(came))
                mailbox.barrier.wait(20)

        return ThreadWorld()


def replace_on_ranks(plan: MatrixPlan, tensors: list[list[torch.Tensor]], work: Callable[..., Any]) -> None:
    """MatrixExchange.replace_matrices on as many threads as the plan has ranks; raises what one of them raises."""
    size = len(plan.slices)
    mailbox = Mailbox(size)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            MatrixExchange(plan, mailbox.world(rank)).replace_matrices(tensors[rank], work)
        except BaseException as error:
            errors.append(error)
            mailbox.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def fill(layout: ShardLayout, matrices: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """What each rank holds of them; padding and gaps are -1."""
    tensors = [[torch.full((layout.shard_size(0),), -1.0)] for _ in range(layout.world_size)]
    for rank in range(layout.world_size):
        for piece in layout.parameter_slices(rank):
            numbers = matrices[piece.name].view(-1)[piece.first : piece.stop]
            tensors[rank][0][piece.offset : piece.offset + len(numbers)] = numbers
    return tensors


sides_of_matrices = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)


@given(shapes=sides_of_matrices, stage=st.sampled_from([2, 3]), size=st.integers(1, 9), data=st.data())
def test_each_matrix_is_worked_on_whole_and_put_back(
    shapes: list[tuple[int, int]], stage: int, size: int, data: st.DataObject
) -> None:
    sides = {f"p{i}": shape for i, shape in enumerate(shapes)}
    layout = layout_of(sides, stage, size, [data.draw(st.integers(0, 5)) for _ in shapes])
    matrices = {name: torch.randn(shape) for name, shape in sides.items()}
    tensors = fill(layout, matrices)
    seen: list[torch.Tensor] = []

    def reverse(whole: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.extend(matrix.clone() for matrix in whole)
        return [matrix.flip(0, 1) for matrix in whole]

    replace_on_ranks(plan_of(sides, layout), tensors, reverse)
    wanted = fill(layout, {name: matrix.flip(0, 1) for name, matrix in matrices.items()})
    for ours, theirs in zip(tensors, wanted, strict=True):
        assert torch.equal(ours[0], theirs[0]), "padding and gaps too"
    assert sorted(x.flatten().tolist() for x in seen) == sorted(x.flatten().tolist() for x in matrices.values())


@given(shapes=sides_of_matrices, stage=st.sampled_from([2, 3]), size=st.integers(1, 64))
def test_a_plan_sends_each_element_to_its_owner_once_and_back_once(
    shapes: list[tuple[int, int]], stage: int, size: int
) -> None:
    sides = {f"p{i}": shape for i, shape in enumerate(shapes)}
    layout = layout_of(sides, stage, size)
    plan = plan_of(sides, layout)
    assert list(plan.owners) == list(sides)
    for name, (rows, columns) in sides.items():
        owner = plan.owners[name]
        here = [piece for piece in plan.slices[owner] if piece.name == name]
        came = [p for sender in range(size) for p in plan.slices_to_owner(sender, owner) if p.name == name]
        went = [p for receiver in range(size) for p in plan.slices_from_owner(owner, receiver) if p.name == name]
        assert came == went
        spans = sorted((piece.first, piece.stop) for piece in here + came)
        assert spans[0][0] == 0
        assert spans[-1][1] == rows * columns
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
        holders = [rank for rank in range(size) if any(p.name == name for p in plan.slices[rank])]
        if len(holders) == 1:
            assert [owner] == holders, "a matrix that was not cut stays where it is"


def test_a_matrix_that_three_ranks_have_is_orthogonalised_as_if_it_were_whole() -> None:
    torch.manual_seed(0)
    sides = {"small": (6, 5), "large": (16, 12), "last": (5, 6)}
    layout = layout_of(sides, 2, 3)
    large_on = [rank for rank in range(3) for piece in layout.parameter_slices(rank) if piece.name == "large"]
    assert large_on == [0, 1, 2]
    matrices = {name: torch.randn(shape) for name, shape in sides.items()}
    for stage in (2, 3):
        layout = layout_of(sides, stage, 3)
        tensors = fill(layout, matrices)
        replace_on_ranks(plan_of(sides, layout), tensors, lambda whole: orthogonalize(whole, 5))
        alone = {name: orthogonalize([matrix], 5)[0] for name, matrix in matrices.items()}
        for ours, theirs in zip(tensors, fill(layout, alone), strict=True):
            assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_all_ranks_hold_whole_is_worked_on_by_one_and_shared(size: int) -> None:
    matrices = [torch.randn(shape) for shape in ((4, 3), (8, 8), (3, 9))]
    plan = plan_whole_matrices(matrices, size, 5)
    tensors = [[matrix.clone().view(-1) for matrix in matrices] for _ in range(size)]
    calls: list[int] = []

    def negate(whole: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.extend(matrix.numel() for matrix in whole)
        return [-matrix for matrix in whole]

    replace_on_ranks(plan, tensors, negate)
    assert sorted(calls) == [12, 27, 64]
    for held in tensors:
        assert all(torch.equal(ours, -matrix.view(-1)) for ours, matrix in zip(held, matrices, strict=True))


def test_large_matrices_are_worked_on_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoltrain.engine.matrix_exchange.BATCH_ELEMENTS", 20)
    matrices = [torch.randn(shape) for shape in ((3, 3), (2, 5), (3, 3), (5, 2), (3, 3))]
    batches: list[list[int]] = []

    def same(whole: list[torch.Tensor]) -> list[torch.Tensor]:
        batches.append([matrix.numel() for matrix in whole])
        return whole

    exchange = MatrixExchange(plan_whole_matrices(matrices, 1, 5))
    exchange.replace_matrices([matrix.view(-1) for matrix in matrices], same)
    assert batches == [[10, 10], [9, 9], [9]], "those of the same sides together, whichever is the longer"


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])  # at 2, 4 and 8 ZeRO-2 happens to cut between two matrices
def test_the_work_is_even_for_a_model_of_135m(stage: int, size: int) -> None:
    """SmolLM2-135M: 30 blocks of 7 matrices. The busiest rank does at most a tenth more than its share."""
    section = load_config("smollm2-135m", []).model
    hidden = split_parameters(build_model(section, device="meta")).hidden
    sides = {name: (parameter.size(0), parameter.size(1)) for name, parameter in hidden.items()}
    assert len(sides) == 210
    plan = plan_of(sides, layout_of(sides, stage, size))
    loads = [sum(flops(*sides[name]) for name in plan.owned_by(rank)) for rank in range(size)]
    assert max(loads) <= 1.1 * sum(loads) / size
