"""Counts what a GPU would be given to do, and how often the host would wait for it, on a CPU.

Each operation of torch that is no view is taken for a kernel, and a compiled loop for one; each number that Python asks
a tensor for is taken for a wait.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from smoltrain.kernels.compile import CompilableFunction
from smoltrain.kernels.device_numbers import ReturningNumbers

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
# They change no memory of the device, or (lift_fresh, of torch.tensor; the profiler's) are the host's.
NO_KERNELS = (
    "aten::lift_fresh", "aten::empty", "aten::new_empty", "aten::empty_like", "aten::_unsafe_view",
    "profiler::_record_function_enter_new", "profiler::_record_function_exit", *READS,
)  # fmt: skip


class DeviceOps(TorchDispatchMode):
    """Counts while it is entered; `kernels` by name, `reads` in all."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.reads += name in READS
        if not func.is_view and name not in NO_KERNELS:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def num_kernels(self) -> int:
        return sum(self.kernels.values())


@contextmanager
def count_device_ops() -> Iterator[DeviceOps]:
    """Counts inside; what CompilableFunction compiles is run as it is written, and counted as one."""
    counts = DeviceOps()

    def compiled(self: CompilableFunction[Any, Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            counts.kernels["compiled"] += 1
            with _disable_current_modes():
                return self(*args)

        return run

    real_read = ReturningNumbers.read

    def read(self: ReturningNumbers) -> list[float]:
        counts.reads += 1
        return real_read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompilableFunction, "compiled", property(compiled))
        patch.setattr(ReturningNumbers, "read", read)
        with counts:
            yield counts
