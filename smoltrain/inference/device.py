"""Where a trained model computes: on the GPU, if this machine has one with room for it."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from smoltrain.model.interface import LanguageModel

GIB = 2**30
ROOM_FOR_WEIGHTS = 1.25  # times their bytes: also what moving, a cache and activations take
ROOM_BESIDE = GIB  # CUDA's context and cuBLAS' workspace


class InferenceDevice(NamedTuple):
    """A device, and why it was chosen; None where this machine leaves no choice."""

    device: torch.device
    reason: str | None


def choose_inference_device(num_bytes: int, free_gpu_bytes: int | None, *, num_processes: int = 1) -> InferenceDevice:
    """For weights of so many bytes in each process, where the first GPU has so many free; None: there is no GPU."""
    cpu = torch.device("cpu")
    if free_gpu_bytes is None:
        return InferenceDevice(cpu, None)
    needed = num_processes * (int(num_bytes * ROOM_FOR_WEIGHTS) + ROOM_BESIDE)
    if needed > free_gpu_bytes:
        has = f"the GPU has {free_gpu_bytes / GIB:.1f} GiB free and the model needs about {needed / GIB:.1f}"
        return InferenceDevice(cpu, f"computes on the CPU: {has}")
    return InferenceDevice(torch.device("cuda", 0), "computes on the GPU, which has room for the model")


def find_free_gpu_bytes() -> int | None:
    """Of the first GPU; None without one."""
    return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None


def move_to_best_device(
    model: LanguageModel, find_free_bytes: Callable[[], int | None] = find_free_gpu_bytes, *, num_processes: int = 1
) -> InferenceDevice:
    """Move a model's weights to where it computes best; which that is. As many processes are to hold such a model."""
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    chosen = choose_inference_device(num_bytes, find_free_bytes(), num_processes=num_processes)
    model.to(chosen.device)
    return chosen
