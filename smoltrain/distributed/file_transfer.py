"""A file of one machine, sent to another over the group of the ranks."""

import os
from pathlib import Path
from typing import BinaryIO

import torch

from smoltrain.distributed.world import World
from smoltrain.files import commit_file

CHUNK_BYTES = 16 << 20


def copy_file(world: World, path: Path, source: int, target: int) -> str | None:
    """Send a file from one rank to the same path of another, on another machine. Both of them call it.

    What the target could not do, in words, or None; on the source always None. Errors: OSError on the source.
    """
    if world.rank == source:
        _send_file(world, path, target)
        return None
    size = torch.zeros(1, dtype=torch.int64)
    world.receive(size, source)
    part = path.with_name(f"{path.name}.part")
    fault: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            fault = _receive_chunks(world, source, int(size.item()), file)
    except OSError as error:  # before anything has come: let it come all the same, as the source cannot hear of it
        _receive_chunks(world, source, int(size.item()), None)
        fault = str(error)
    if fault is None:
        commit_file(part, path)
    return fault


def _send_file(world: World, path: Path, target: int) -> None:
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        world.send(torch.tensor([num_bytes]), target)
        while num_bytes > 0:
            chunk = bytearray(file.read(min(CHUNK_BYTES, num_bytes)))
            if not chunk:
                raise OSError(f"{path} has become shorter while it was sent")
            world.send(torch.frombuffer(chunk, dtype=torch.uint8), target)
            num_bytes -= len(chunk)


def _receive_chunks(world: World, source: int, num_bytes: int, file: BinaryIO | None) -> str | None:
    """Write what comes, all of it even if writing fails; the first fault in words."""
    fault: str | None = None
    while num_bytes > 0:
        chunk = torch.empty(min(CHUNK_BYTES, num_bytes), dtype=torch.uint8)
        world.receive(chunk, source)
        num_bytes -= chunk.numel()
        if file is None or fault is not None:
            continue
        try:
            file.write(chunk.numpy().data)
        except OSError as error:
            fault = str(error)
    return fault
