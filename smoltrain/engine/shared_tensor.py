"""A flat tensor on every rank, of which each rank owns a part: reduce-scattered into the parts, all-gathered from them.

Ranks on the CPU of one machine read each other's tensor in shared memory, where no byte needs to be sent.
Others use the collectives of their group.
"""

import contextlib
import os
import secrets

import psutil
import torch

from smoltrain.distributed.world import World

MARK_BYTES = 16


class SharedTensor:
    """`own` is this rank's tensor, zeros at first; `part` the slice of it that this rank owns."""

    def __init__(self, world: World, numel: int, dtype: torch.dtype) -> None:
        """`numel` is a multiple of the ranks. Collective."""
        assert numel % world.size == 0
        self._world = world
        self._rank_tensors = _map_shared_memory(world, numel, dtype)
        if self._rank_tensors:
            self.own = self._rank_tensors[world.rank]
        else:
            self.own = torch.zeros(numel, dtype=dtype, device=world.device)
        size = numel // world.size
        self.part = slice(world.rank * size, (world.rank + 1) * size)

    @property
    def how(self) -> str:
        """By what means the ranks exchange numbers."""
        if self._world.size == 1:
            return "no communication (one rank)"
        return "through shared memory" if self._rank_tensors else "by collectives"

    def reduce_scatter(self) -> torch.Tensor:
        """This rank's part of the sum over the ranks. Collective.

        It stands in `own`, the rest of which is void then. No rank may write to `own` before the next
        collective: another may still read there.
        """
        mine = self.own[self.part]
        if self._rank_tensors:
            self._world.barrier()
            for rank, other in enumerate(self._rank_tensors):
                if rank != self._world.rank:
                    mine += other[self.part]
        elif self._world.size > 1:
            total = torch.empty_like(mine)
            self._world.reduce_scatter(total, self.own)
            mine.copy_(total)
        return mine

    def all_gather(self) -> None:
        """Fill `own` with the part of every rank. Collective."""
        if self._rank_tensors:
            self._world.barrier()
            size = self.part.stop - self.part.start
            for rank, other in enumerate(self._rank_tensors):
                if rank != self._world.rank:
                    part = slice(rank * size, (rank + 1) * size)
                    self.own[part] = other[part]
        elif self._world.size > 1:
            self._world.all_gather(self.own, self.own[self.part])


def _map_shared_memory(world: World, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every rank's tensor in shared memory, or [] where they do not share any. Collective."""
    if world.size == 1 or world.size != world.local_size or world.device.type != "cpu":
        return []
    num_bytes = numel * dtype.itemsize
    handle = _reserve_shared_memory(max(1, num_bytes))
    mark = secrets.token_bytes(min(MARK_BYTES, num_bytes))
    offers = world.gather(("" if handle is None else f"/proc/{os.getpid()}/fd/{handle}", mark))
    tensors: list[torch.Tensor] = []
    if all(path for path, _ in offers):
        with contextlib.suppress(RuntimeError):  # where a rank may not look at another's files
            tensors = [torch.from_file(path, shared=True, size=numel, dtype=dtype) for path, _ in offers]
    are_shared = _are_marks_seen(world, tensors, [mark for _, mark in offers])
    [without] = world.sum_ints(not are_shared)
    if handle is not None:
        os.close(handle)  # the maps stay
    if without:
        return []
    tensors[world.rank].zero_()
    return tensors


def _are_marks_seen(world: World, tensors: list[torch.Tensor], marks: list[bytes]) -> bool:
    """Whether each rank's mark stands in what this rank takes for that one's tensor. Collective.

    A path of /proc may lead elsewhere where two machines or containers count their processes alike: to this rank's own
    memory even, and every sum would be false.
    """
    size = len(marks[world.rank])
    if tensors:
        own = tensors[world.rank].view(torch.uint8)
        own[:size] = torch.frombuffer(bytearray(marks[world.rank]), dtype=torch.uint8) if size else own[:0]
    world.barrier()
    return bool(tensors) and all(
        bytes(tensor.view(torch.uint8)[:size].tolist()) == mark for tensor, mark in zip(tensors, marks, strict=True)
    )


def _reserve_shared_memory(num_bytes: int) -> int | None:
    """A handle of zeros in memory that has no name, so that no kill can leave it behind; None if there is no room."""
    if not hasattr(os, "memfd_create"):  # Linux alone has it: man 2 memfd_create
        return None
    if psutil.virtual_memory().available < num_bytes:
        return None
    handle = os.memfd_create("smoltrain")
    try:
        os.posix_fallocate(handle, 0, num_bytes)  # else a page that the kernel lacks would be a SIGBUS later
    except OSError:
        os.close(handle)
        return None
    return handle
