"""Copies of what is saved: of all, once, and in memory that is kept."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smoltrain.checkpoint.host_copies import HostCopies
from smoltrain.files import read_tensors, write_tensors

CPU = torch.device("cpu")


@pytest.fixture
def pinned() -> list[Tensor]:
    """What was pinned, or would have been: there is no GPU that could tell."""
    return []


def pin_into(pinned: list[Tensor]) -> Callable[[int], Tensor]:
    def pin(num_bytes: int) -> Tensor:
        pinned.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return pinned[-1]

    return pin


@pytest.mark.parametrize("keeps", [False, True])
def test_a_copy_shares_nothing_but_what_was_shared(keeps: bool, pinned: list[Tensor]) -> None:
    tied = torch.ones(3)
    scale = SimpleNamespace(now=2)
    turned = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T
    tree: dict[str, Any] = OrderedDict(
        a=[tied, {"b": tied}], scale=scale, end=(tied[:2], 7), turned=turned, nothing=torch.empty(0), none=None
    )
    copies = HostCopies(CPU, pin_into(pinned) if keeps else None)
    copies.begin(tree)
    copied = copies.copy_tree(tree)
    again = copies.copy_tensor(tied)
    copies.wait()
    tied.zero_()
    turned.zero_()
    scale.now = 3
    assert isinstance(copied, OrderedDict)
    assert copied["a"][0] is copied["a"][1]["b"] is again
    assert copied["a"][0].tolist() == [1, 1, 1]
    assert copied["end"][0].tolist() == [1, 1]
    assert (copied["end"][1], copied["scale"].now, copied["none"]) == (7, 2, None)
    assert copied["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["nothing"].shape == (0,)
    assert len(pinned) == keeps


def test_memory_is_kept_for_the_next_save_and_a_file_holds_no_more_than_its_own(
    tmp_path: Path, pinned: list[Tensor]
) -> None:
    copies = HostCopies(CPU, pin_into(pinned))
    large, small = torch.randn(50_000), torch.randn(10)
    for step in range(3):
        tree = {"large": large + step, "small": small + step}
        copies.begin(tree)
        copied = copies.copy_tree(tree)
        copies.wait()
        first, last = pinned[0].data_ptr(), pinned[0].data_ptr() + len(pinned[0])
        assert all(first <= tensor.data_ptr() < last for tensor in copied.values())
        write_tensors(tmp_path / "small.pt", {"small": copied["small"]})
        assert (tmp_path / "small.pt").stat().st_size < 4 * 10_000, "torch.save writes whole storages"
        assert torch.equal(read_tensors(tmp_path / "small.pt")["small"], small + step)
        assert torch.equal(copied["large"], large + step)
    assert len(pinned) == 1
    copies.begin([torch.zeros(60_000)])
    assert len(pinned) == 2, "more than there was room for"


def test_a_tensor_that_came_later_is_copied_too(pinned: list[Tensor]) -> None:
    copies = HostCopies(CPU, pin_into(pinned))
    copies.begin([torch.ones(4)])
    gathered = torch.full((1000,), 3.0)
    copied = copies.copy_tensor(gathered)
    gathered.zero_()
    assert copied.unique().tolist() == [3.0]
