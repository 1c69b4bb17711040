"""What of a micro-batch crosses to a device, and what is made of it there."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.data.rows.batch import Batch
from tests.data.worlds import B, T, World, cached

SEPARATOR = 0
ROWS = st.integers(1, 7).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 2), min_size=length + 1, max_size=length + 1), min_size=1)
)


class Copies:
    """What was pinned, and what was sent to a device that is not there: (tensor, whether the host goes on)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: list[torch.Tensor] = []
        self.sent: list[tuple[torch.Tensor, bool]] = []

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            self.pinned.append(tensor.clone(memory_format=torch.preserve_format))  # as torch does, gaps and all
            return self.pinned[-1]

        def send(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
            assert device.type == "cuda"
            self.sent.append((tensor, non_blocking))
            return tensor

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.Tensor, "to", send)


@pytest.mark.parametrize("document_mask", [False, True])
def test_one_pinned_contiguous_int32_tensor_crosses(document_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = World(cached(31), 1, micro_batch=2, document_mask=document_mask).ranks
    micro_batches = [*loaders[0].fetch_step_rows().micro_batches, *loaders[0].validation_batches(5)]
    expected = [(batch.ids_BT, batch.labels_BT, batch.positions_BT) for batch in micro_batches]
    copies = Copies(monkeypatch)
    there = [batch.to(torch.device("cuda")) for batch in micro_batches]
    assert len(copies.pinned) == len(copies.sent) == len(micro_batches) == B // 2 + 3
    for pinned, (sent, is_asynchronous) in zip(copies.pinned, copies.sent, strict=True):
        assert sent is pinned
        assert pinned.is_contiguous()
        assert is_asynchronous
        assert pinned.nbytes == 2 * (T + 1) * 4
    for batch, tensors in zip(there, expected, strict=True):
        for ours, want in zip((batch.ids_BT, batch.labels_BT, batch.positions_BT), tensors, strict=True):
            if want is None:
                assert ours is None
            else:
                assert ours is not None
                assert torch.equal(ours, want)


def test_a_view_with_gaps_is_no_batch() -> None:
    rows = torch.arange(12, dtype=torch.int32).view(3, 4)
    with pytest.raises(AssertionError):
        Batch(rows[:, :-1])
    with pytest.raises(AssertionError):
        Batch(rows.long())


@given(ROWS)
def test_inputs_labels_and_positions_are_their_definition(rows: list[list[int]]) -> None:
    plain = Batch(torch.tensor(rows, dtype=torch.int32))
    batch = Batch(plain.ids_BS, SEPARATOR).to(torch.device("cpu"))
    assert plain.positions_BT is None
    assert plain.document_arguments() == {}
    assert batch.positions_BT is not None
    tensors: tuple[Any, ...] = (batch.ids_BT, batch.labels_BT, batch.positions_BT, plain.labels_BT)
    assert all(tensor.dtype == torch.int64 for tensor in tensors)
    num_documents = 0
    for row, ids, labels, positions, plain_labels in zip(rows, *(x.tolist() for x in tensors), strict=True):
        assert ids == row[:-1]
        assert plain_labels == row[1:]
        place = 0
        for i, token in enumerate(ids):
            assert positions[i] == place
            assert labels[i] == (-100 if token == SEPARATOR else row[i + 1])
            num_documents += place == 0
            place = 0 if token == SEPARATOR else place + 1
    assert batch.num_documents == num_documents


@given(st.integers(0, 4), st.integers(0, 3))
def test_rows_that_have_no_label_have_none_in_a_slice(num_labelled: int, first: int) -> None:
    whole = Batch(torch.arange(12, dtype=torch.int32).view(4, 3), num_labelled=num_labelled)
    assert (whole.labels_BT != -100).all(1).tolist() == [row < num_labelled for row in range(4)]
    assert whole.slice_rows(first, 4).labels_BT.equal(whole.labels_BT[first:])
