"""What a rank's collectives send, and how long it waits for them: counted where they are called, in a step alone.

The methods of World are metered, and DeepSpeed's collectives, all of which go through one object of its own
(engine/deepspeed_private.py). Seconds are those between two moments of the device: on a CPU of the host's clock, as
gloo blocks; on a GPU of events around the collective, which are read when the step is over. A collective that runs
beside computing (async_op) counts where it is waited for. The exchanges of a GPU's host over gloo are not in it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

CollectiveKind = Literal["reduce-scatter", "all-gather", "all-reduce", "all-to-all", "broadcast", "reduce"]
GROUP_PLACE = 2  # of the process group among the arguments of DeepSpeed's collectives, where it has no name


def sent_bytes(kind: CollectiveKind, num_bytes: float, ranks: int) -> float:
    """What a rank sends of a tensor of so many bytes, the whole one: its share around a ring (Patarasuk & Yuan 2009).

    Of an all-to-all the bytes are those that go to others. Of what trees pass on, all of them count.
    """
    if ranks == 1:
        return 0.0
    if kind in ("all-to-all", "broadcast", "reduce"):
        return num_bytes
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * num_bytes * (ranks - 1) / ranks


def choose_reduce_scatter(device: str) -> CollectiveKind:
    """What a reduce-scatter of such a device is: torch's gloo has none, it all-reduces and copies what is wanted."""
    return "reduce-scatter" if device == "cuda" else "all-reduce"


class Moment(Protocol):
    """kernels/device_numbers.py has one for each kind of device."""

    def seconds_since(self, earlier: Any) -> float:
        """Seconds between the two."""
        ...


@dataclass
class StepCommunication:
    """The collectives of one step on this rank."""

    take_moment: Callable[[], Moment]
    sent_bytes: float = 0.0
    _spans: list[tuple[Moment, Moment]] = field(default_factory=list)

    def seconds(self) -> float:
        """In which this rank was in collectives, waiting for slower ranks too."""
        return sum(after.seconds_since(before) for before, after in self._spans)

    @contextlib.contextmanager
    def time(self) -> Iterator[None]:
        """Inside is a collective, or the wait for one."""
        before = self.take_moment()
        yield
        self._spans.append((before, self.take_moment()))


class CommunicationMeter:
    """Counts for the step that it is given, and for none between two steps."""

    def __init__(self) -> None:
        self._step: StepCommunication | None = None

    def record_into(self, step: StepCommunication | None) -> None:
        """From now on; None: nothing is counted."""
        self._step = step

    @contextlib.contextmanager
    def measure(self, kind: CollectiveKind, num_bytes: float, ranks: int) -> Iterator[None]:
        """Inside is one call of a collective, whose whole tensor has so many bytes."""
        step = self._step
        if step is None:
            yield
            return
        self._step = None  # what a collective calls in its turn is part of it
        step.sent_bytes += sent_bytes(kind, num_bytes, ranks)
        try:
            with step.time():
                yield
        finally:
            self._step = step

    def metered(self, collective: Callable[..., Any], kind: CollectiveKind, count_ranks: Callable[[Any], int]) -> Any:
        """The same function of DeepSpeed's, measured; `count_ranks`: of a process group."""

        def call(*args: Any, **more: Any) -> Any:
            step = self._step
            if step is None:
                return collective(*args, **more)
            group = more["group"] if "group" in more else args[GROUP_PLACE]
            num_bytes = max(_count_bytes(value) for value in (*args, *more.values()))
            with self.measure(kind, num_bytes, count_ranks(group)):
                work = collective(*args, **more)
            return MeteredWork(work, step) if hasattr(work, "wait") else work

        return call


class MeteredWork:
    """A collective under way, the wait for which is measured; in all else that of torch."""

    def __init__(self, work: Any, step: StepCommunication) -> None:
        self._work = work
        self._step = step

    def wait(self, *args: Any) -> Any:
        """Until it is done."""
        with self._step.time():
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _count_bytes(value: Any) -> int:
    """Of a tensor, or of all in a list; 0 of anything else."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Sequence) and not isinstance(value, str):
        return sum(map(_count_bytes, value))
    return 0
