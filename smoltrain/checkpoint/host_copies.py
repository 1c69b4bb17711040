"""Copies in host memory of what a checkpoint holds, for which training stands still.

From a GPU they go into pinned memory, which the device writes by itself at the speed of its link (CUDA C++ Best
Practices Guide, "Pinned Memory"): the host starts all copies and waits once. Pinning costs more than copying, so the
memory is kept and used again by the next save, which begins when the files of this one are written.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, at which each copy begins


class HostCopies:
    """Makes the copies of one checkpoint after the other; those of the one before are overwritten.

    A tensor that occurs twice, as tied weights do, is copied once.
    """

    def __init__(self, device: torch.device, pin: Callable[[int], Tensor] | None = None) -> None:
        """`pin` makes so many bytes of memory that are kept; by default pinned ones on a GPU, and else none are.

        A CPU's copies are of memory that is given back: its ranks share what there is with training.
        """
        self._pin = pin or (_pin_memory if device.type == "cuda" else None)
        self._kept = torch.empty(0, dtype=torch.uint8)
        self._used = 0  # bytes of what is kept
        self._copies: dict[Any, Tensor] = {}

    def begin(self, trees: Any) -> None:
        """Forget the copies that there were, and make room for those of all tensors in nested containers."""
        self._copies.clear()
        self._used = 0
        if self._pin is None:
            return
        num_bytes = sum(map(_padded_size, {_key_of(tensor): tensor for tensor in list_tensors(trees)}.values()))
        if num_bytes > len(self._kept):
            self._kept = torch.empty(0, dtype=torch.uint8)  # given back first
            self._kept = self._pin(num_bytes)

    def copy_tree(self, tree: Any) -> Any:
        """The same containers with copies of the tensors; numbers are copied, as some of DeepSpeed's objects change."""
        if isinstance(tree, Tensor):
            return self.copy_tensor(tree)
        if isinstance(tree, dict):
            copied = copy.copy(tree)  # of its own kind
            copied.update({key: self.copy_tree(value) for key, value in tree.items()})
            return copied
        if type(tree) in (list, tuple):
            return type(tree)(self.copy_tree(value) for value in tree)
        return copy.deepcopy(tree)

    def copy_tensor(self, tensor: Tensor) -> Tensor:
        """One copy. From a GPU it is there when `wait` returns."""
        key = _key_of(tensor)
        if key not in self._copies:
            self._copies[key] = self._start_copy(tensor.detach())
        return self._copies[key]

    def wait(self) -> None:
        """Return when all copies are there, and training may change what they are of."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _start_copy(self, tensor: Tensor) -> Tensor:
        has_room = self._used + _padded_size(tensor) <= len(self._kept)
        if not tensor.nbytes or not has_room:  # weights that ZeRO-3 has gathered meanwhile have none
            return tensor.to("cpu", copy=True)
        # A storage of its own for each tensor: torch.save writes whole storages.
        part = self._kept.numpy().data[self._used : self._used + tensor.nbytes]
        self._used += _padded_size(tensor)
        return torch.frombuffer(part, dtype=tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def list_tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(tree, Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if type(tree) in (list, tuple) else ()
    return [tensor for value in values for tensor in list_tensors(value)]


def _pin_memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _padded_size(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _key_of(tensor: Tensor) -> Any:
    """The same for two tensors that are one."""
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
