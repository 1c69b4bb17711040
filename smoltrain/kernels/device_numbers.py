"""A few numbers on their way between the host and a GPU, of which neither waits for the other.

A copy from memory that is not pinned, and a number that Python asks a tensor for, stop the host until the GPU has done
all that it was given before; then the GPU has nothing to do until the host has thought of something new. On a CPU a
copy is no copy, and a number is there as soon as it is asked for.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor


def send_numbers(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers on the device, (n,). It may not have them yet when this returns, but before what it does next."""
    on_host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


class ReturningNumbers:
    """Numbers of a device that the host will read later: they begin to come back when this is made."""

    def __init__(self, numbers: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        self._on_host = numbers
        if numbers.device.type == "cuda":
            self._on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._on_host.copy_(numbers, non_blocking=True)
            self._arrival = torch.cuda.Event(blocking=True)  # meanwhile the core is free for the data
            self._arrival.record()

    def read(self) -> list[float]:
        """Wait until they are there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._on_host.tolist()


class DeviceMoment:
    """When the device has done all that it was given until now: on a GPU not the time at which the host asks."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._host_s = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: "DeviceMoment") -> float:
        """Seconds between the two. Waits for the later one."""
        if self._event is None or earlier._event is None:
            return self._host_s - earlier._host_s
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
